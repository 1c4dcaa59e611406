"""To transformers: a directory that its Auto classes load with no code of ours."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manta.trainer.architectures.config_json import Config, to_theirs
from manta.trainer.architectures.families import ARCHITECTURES, Architecture, architecture_for
from manta.trainer.architectures.tensor_map import Link, bind, tensors
from manta.trainer.convert.huggingface import weight_files
from manta.trainer.convert.huggingface.directory import CARD, CONFIG, make_directory, refuse_to_overwrite
from manta.trainer.convert.huggingface.model_card import card
from manta.trainer.convert.huggingface.tokenizer_files import tokenizer_files
from manta.trainer.pretrained.load import Pretrained
from manta.trainer.pretrained.source import Source

SHARD_SIZE = 5_000_000_000
ALWAYS_WIDE = ("e_score_correction_bias",)  # transformers keeps it in fp32, whatever the rest is in


def export(trained: Pretrained, directory: Path, *, dtype: torch.dtype | None = None, shard_size: int = SHARD_SIZE) -> None:
    """Writes config, weights, tokenizer and model card. `dtype`: None for that of an import, fp32 for a run's.

    Raises InputError where transformers has no such model, or anything but an earlier export of the same run lies in `directory`.
    """
    refuse_to_overwrite(directory, trained.home)
    origin = trained.source
    architecture = architecture_for(trained.config) if origin is None else _named(origin.architecture)
    held, vocabulary = tensors(trained.model), trained.vocabulary
    experts = trained.config.experts.experts if trained.config.experts else 0
    links = bind(architecture.rows, held, layers=trained.config.layers, experts=experts)
    planned = _plan(links, held, vocabulary, dtype or torch.float32, origin if dtype is None else None)
    main = Counter(shape.dtype for shape in planned.values()).most_common(1)[0][0]
    place = {name: link for link in links for name in link.theirs}

    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_directory(partial)
    try:
        weight_files.write(partial, planned, lambda name: place[name].export(held, vocabulary)[name], limit=shard_size)
        theirs = _config(trained, architecture, main) if origin is None else _kept_config(origin, dtype)
        write_json(partial / CONFIG, theirs)
        for name, content in tokenizer_files(trained).items():
            (partial / name).write_bytes(content)
        if origin is None and architecture.family != "bert":
            end = trained.tokenizer.end_of_text
            write_json(partial / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "do_sample": True})
        (partial / CARD).write_text(card(trained, architecture.name, main))
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _plan(
    links: list[Link], held: dict[str, Tensor], vocabulary: int, dtype: torch.dtype, origin: Source | None
) -> dict[str, weight_files.Shape]:
    """What is to be written, in the order of the model."""
    shapes: dict[str, weight_files.Shape] = {}
    for link in links:
        meta = {name: held[name].to("meta") for name in link.ours}
        for name, tensor in link.export(meta, vocabulary).items():
            if origin is not None:
                chosen = getattr(torch, origin.dtypes.get(name, origin.dtype))
            else:
                chosen = torch.float32 if name.endswith(ALWAYS_WIDE) else dtype
            shapes[name] = weight_files.Shape(tuple(tensor.shape), chosen)
    return shapes


def _config(trained: Pretrained, architecture: Architecture, dtype: torch.dtype) -> Config:
    learned: Any = getattr(trained.model, "position_embedding", None)
    positions = trained.sequence_length if learned is None else learned.num_embeddings
    theirs = to_theirs(architecture, trained.config, vocabulary=trained.vocabulary, positions=positions)
    if architecture.family == "bert":
        theirs["pad_token_id"] = trained.tokenizer.special_tokens().pad
    else:
        theirs |= {"bos_token_id": trained.tokenizer.end_of_text, "eos_token_id": trained.tokenizer.end_of_text}
    return theirs | {"dtype": str(dtype).removeprefix("torch.")}


def _kept_config(origin: Source, dtype: torch.dtype | None) -> Config:
    """What came with it, but for the precision where another is wanted."""
    if dtype is None:
        return origin.config
    key = "torch_dtype" if "torch_dtype" in origin.config else "dtype"
    return origin.config | {key: str(dtype).removeprefix("torch.")}


def _named(name: str) -> Architecture:
    return next(architecture for architecture in ARCHITECTURES.values() if architecture.name == name)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
