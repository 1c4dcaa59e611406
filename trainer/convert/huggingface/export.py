"""Export a model to a directory that the Auto classes of transformers load.

To add an export format, write a package beside `huggingface` with an `export`, and an option of `manta export` (launch/cli.py).
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor

from manta.data.errors import InputError, cut, one_line
from manta.data.tokenizer.tokenizer import read_tokenizer
from manta.trainer.architectures.architecture import ARCHITECTURES, Architecture, map_tensors
from manta.trainer.architectures.config_json import ConfigJson, architecture_for, to_hf_config
from manta.trainer.checkpoint.errors import SaveError
from manta.trainer.convert.huggingface.directory import CARD, CONFIG, INDEX, TOKENIZER, copy_kept_files, refuse_to_overwrite, staged
from manta.trainer.convert.huggingface.model_card import model_card
from manta.trainer.model.bert import Bert
from manta.trainer.pretrained.load import SOURCE_FILE, ImportSource, Pretrained, model_tensors
from manta.trainer.run_directory import RunDirectory

__all__ = ["export"]

SHARD_SIZE = 5_000_000_000
ALWAYS_FP32 = ("e_score_correction_bias",)  # as transformers keeps it, whatever the dtype of the model


def export(pretrained: Pretrained, directory: Path, *, dtype: torch.dtype | None = None, shard_size: int = SHARD_SIZE) -> None:
    """Write config, weights, tokenizer and model card. dtype: by default that of an import's files, fp32 for a run.

    Raises InputError if transformers has no such model, or `directory` holds anything but an earlier export of the same run.
    """
    refuse_to_overwrite(directory, pretrained.run_directory)
    source, config, vocabulary = pretrained.source, pretrained.config, pretrained.vocabulary
    architecture = architecture_for(config) if source is None else _architecture_of(source, pretrained.run_directory)
    tensors = model_tensors(pretrained.model)
    lacking = () if source is None else source.lacking
    mappings = {name: mapping for mapping in map_tensors(architecture, config, tensors) for name in mapping.hf if name not in lacking}
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    views = {name: mapping.to_hf(meta, vocabulary)[name] for name, mapping in mappings.items()}
    specs = {name: view.to(_dtype(name, dtype, source), copy=True) for name, view in views.items()}  # without the padding of its storage
    most_common = Counter(spec.dtype for spec in specs.values()).most_common(1)[0][0]
    with staged(directory) as partial:
        _write_weights(partial, specs, lambda name: mappings[name].to_hf(tensors, vocabulary)[name], limit=shard_size)
        if source is None:
            _write_json(partial / CONFIG, _config(pretrained, architecture, most_common))
            _write_tokenizer(partial, pretrained)
        else:
            key = "torch_dtype" if "torch_dtype" in source.config else "dtype"
            _write_json(partial / CONFIG, source.config | ({} if dtype is None else {key: str(dtype).removeprefix("torch.")}))
            copy_kept_files(pretrained.run_directory.path, partial)
        name = architecture.subset if lacking and architecture.subset else architecture.name
        (partial / CARD).write_text(model_card(pretrained, name, most_common), encoding="utf-8")
        shutil.rmtree(directory.resolve(), ignore_errors=True)


def _architecture_of(source: ImportSource, run_directory: RunDirectory) -> Architecture:
    architecture = next((each for each in ARCHITECTURES.values() if each.name == source.architecture), None)
    if architecture is None:
        names, file = ", ".join(each.name for each in ARCHITECTURES.values()), run_directory.path / SOURCE_FILE
        raise InputError(f"{file}: architecture: expected {names}, got {cut(repr(source.architecture))}. Import again.")
    return architecture


def _dtype(name: str, dtype: torch.dtype | None, source: ImportSource | None) -> torch.dtype:
    if dtype is None and source is not None:
        return getattr(torch, source.dtypes.get(name, source.dtype))
    return torch.float32 if dtype is None or name.endswith(ALWAYS_FP32) else dtype


def _write_weights(directory: Path, specs: Mapping[str, Tensor], read: Callable[[str], Tensor], *, limit: int) -> None:
    """Write files of at most `limit` bytes each, unless a single tensor is larger. Holds one file's tensors at a time.

    specs: all tensors, on the meta device.
    """
    split = split_torch_state_dict_into_shards(dict(specs), filename_pattern="model{suffix}.safetensors", max_shard_size=limit)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: read(name).to(specs[name].dtype).contiguous() for name in names}
        try:
            save_file(tensors, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:  # what it makes of an OSError
            raise SaveError(f"{directory / file}: {one_line(error)}. Free space, or choose another directory with --output.") from None
    if split.is_sharded:
        _write_json(directory / INDEX, {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))})


def _config(pretrained: Pretrained, architecture: Architecture, dtype: torch.dtype) -> ConfigJson:
    learned: Any = getattr(pretrained.model, "position_embedding", None)
    positions = pretrained.sequence_length if learned is None else learned.num_embeddings
    config = to_hf_config(architecture, pretrained.config, vocabulary=pretrained.vocabulary, positions=positions)
    if architecture.family == "bert":
        config["pad_token_id"] = pretrained.tokenizer.special_tokens().pad
    else:
        config |= dict.fromkeys(("bos_token_id", "eos_token_id"), pretrained.tokenizer.end_of_text)
    return config | {"dtype": str(dtype).removeprefix("torch.")}


def _write_tokenizer(directory: Path, pretrained: Pretrained) -> None:
    """Write the files that AutoTokenizer loads, and the special tokens for generation.

    They do what training did, whatever the run's tokenizer.json adds to a text, how it pads and where it cuts.
    """
    tokenizer, content = pretrained.tokenizer, read_tokenizer(pretrained.tokenizer.file)
    spec: dict[str, Any] = json.loads(content)
    tokens: dict[str, object]
    if isinstance(pretrained.model, Bert):
        special = tokenizer.special_tokens()
        names = {f"{key}_token": tokenizer.decode([getattr(special, key)]) for key in ("cls", "sep", "mask", "pad")}
        tokens = {**names, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
        frame = _frame((names["cls_token"], special.cls), (names["sep_token"], special.sep))
    else:
        tokens = dict.fromkeys(("bos_token", "eos_token"), tokenizer.end_of_text_name)
        if pretrained.run_directory.config().data.packing == "best_fit":
            tokens["pad_token"] = tokenizer.end_of_text_name
        ids = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text)
        _write_json(directory / "generation_config.json", {**ids, "do_sample": True})
        steps = spec.get("post_processor") or {}
        frame = next((step for step in steps.get("processors", [steps]) if step.get("type") == "ByteLevel"), None)  # it adds no token
    trained_with = {"truncation": None, "padding": None, "post_processor": frame}
    if any(spec.get(key) != value for key, value in trained_with.items()):
        content = json.dumps(spec | trained_with, indent=2, ensure_ascii=False)
    (directory / TOKENIZER).write_bytes(content.encode())
    split = spec.get("pre_tokenizer") or {}
    tokens |= {key: split[key] for key in ("add_prefix_space",) if key in split}  # transformers overrides the file's by its own default
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, "model_max_length": pretrained.sequence_length}
    _write_json(directory / "tokenizer_config.json", config | {"padding_side": "right", "clean_up_tokenization_spaces": False})


def _frame(cls: tuple[str, int], sep: tuple[str, int]) -> dict[str, Any]:
    """Return the step that puts the special tokens of BERT's pretraining around a text, or a pair of texts."""
    single, pair = f"{cls[0]} $A {sep[0]}", f"{cls[0]} $A {sep[0]} $B:1 {sep[0]}:1"
    return json.loads(processors.TemplateProcessing(single=single, pair=pair, special_tokens=[cls, sep]).__getstate__())


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
