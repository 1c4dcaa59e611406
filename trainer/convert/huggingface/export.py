"""Export a model to a directory that the Auto classes of transformers load."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from manta.trainer.architectures.architecture import Architecture
from manta.trainer.architectures.config_json import ConfigJson, to_hf_config
from manta.trainer.architectures.families import ARCHITECTURES, architecture_for, map_tensors
from manta.trainer.architectures.tensor_map import hf_shapes
from manta.trainer.convert.huggingface.directory import CARD, CONFIG, refuse_to_overwrite, staged
from manta.trainer.convert.huggingface.model_card import model_card
from manta.trainer.convert.huggingface.tokenizer_files import tokenizer_files
from manta.trainer.convert.huggingface.weight_files import TensorSpec, write_weights
from manta.trainer.pretrained.load import Pretrained
from manta.trainer.pretrained.source import ImportSource
from manta.trainer.pretrained.weights import model_tensors

__all__ = ["export"]

SHARD_SIZE = 5_000_000_000
ALWAYS_FP32 = ("e_score_correction_bias",)  # as transformers keeps it, whatever the dtype of the model


def export(pretrained: Pretrained, directory: Path, *, dtype: torch.dtype | None = None, shard_size: int = SHARD_SIZE) -> None:
    """Write config, weights, tokenizer and model card. dtype: by default that of an import's files, fp32 for a run.

    Raises InputError if transformers has no such model, or `directory` holds anything but an earlier export of the same run.
    """
    refuse_to_overwrite(directory, pretrained.run_directory)
    source, config, vocabulary = pretrained.source, pretrained.config, pretrained.vocabulary
    architecture = architecture_for(config) if source is None else _by_name(source.architecture)
    tensors = model_tensors(pretrained.model)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    mappings = map_tensors(architecture, config, shapes)
    by_name = {name: mapping for mapping in mappings for name in mapping.hf}
    specs = {name: TensorSpec(shape, _dtype(name, dtype, source)) for name, shape in hf_shapes(mappings, shapes, vocabulary).items()}
    most_common = Counter(spec.dtype for spec in specs.values()).most_common(1)[0][0]
    with staged(directory) as partial:
        write_weights(partial, specs, lambda name: by_name[name].to_hf(tensors, vocabulary)[name], limit=shard_size)
        content = _config(pretrained, architecture, most_common) if source is None else _imported_config(source, dtype)
        write_json(partial / CONFIG, content)
        for name, content in tokenizer_files(pretrained).items():
            (partial / name).write_bytes(content)
        if source is None and architecture.family != "bert":
            end = pretrained.tokenizer.end_of_text
            write_json(partial / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "do_sample": True})
        (partial / CARD).write_text(model_card(pretrained, architecture.name, most_common))
        shutil.rmtree(directory, ignore_errors=True)


def _dtype(name: str, dtype: torch.dtype | None, source: ImportSource | None) -> torch.dtype:
    if dtype is None and source is not None:
        return getattr(torch, source.dtypes.get(name, source.dtype))
    return torch.float32 if dtype is None or name.endswith(ALWAYS_FP32) else dtype


def _config(pretrained: Pretrained, architecture: Architecture, dtype: torch.dtype) -> ConfigJson:
    learned: Any = getattr(pretrained.model, "position_embedding", None)
    positions = pretrained.sequence_length if learned is None else learned.num_embeddings
    config = to_hf_config(architecture, pretrained.config, vocabulary=pretrained.vocabulary, positions=positions)
    if architecture.family == "bert":
        config["pad_token_id"] = pretrained.tokenizer.special_tokens().pad
    else:
        config |= dict.fromkeys(("bos_token_id", "eos_token_id"), pretrained.tokenizer.end_of_text)
    return config | {"dtype": str(dtype).removeprefix("torch.")}


def _imported_config(source: ImportSource, dtype: torch.dtype | None) -> ConfigJson:
    """Return the config of the import's files, with another dtype if requested."""
    if dtype is None:
        return source.config
    key = "torch_dtype" if "torch_dtype" in source.config else "dtype"
    return source.config | {key: str(dtype).removeprefix("torch.")}


def _by_name(name: str) -> Architecture:
    return next(architecture for architecture in ARCHITECTURES.values() if architecture.name == name)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
