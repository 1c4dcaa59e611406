"""A trained or imported model in one process that does not train: where generation and export start."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from manta.data.config_history import upgrade
from manta.data.errors import InputError, cut, one_line
from manta.data.storage.regular_file import read_regular
from manta.data.tokenizer.tokenizer import Tokenizer
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.manifest import Checkpoint, first_difference
from manta.trainer.checkpoint.token_rows import TOKEN_ROWS
from manta.trainer.config.model import ModelConfig
from manta.trainer.config.yaml_file import read_yaml
from manta.trainer.model.build import build_model
from manta.trainer.model.transformer import Transformer
from manta.trainer.run_directory import RunDirectory, resolve_start_from

MODEL_FILE, SOURCE_FILE = "model.yaml", "source.json"  # of an import; a run directory has neither
MAX_SOURCE_BYTES = 2**27
Dtype = Literal["float32", "bfloat16", "float16"]


class ImportSource(BaseModel):
    """source.json: where an imported model comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    architecture: str
    dtype: Dtype
    """Of most tensors."""
    dtypes: dict[str, Dtype]
    """Of the other tensors, by name."""
    lacking: tuple[str, ...] = ()
    """Tensors that the files did not have, and the import initialized."""
    end_of_text: str
    sequence_length: int = Field(ge=1)
    """The longest that the model has positions for."""
    config: dict[str, Any]
    """The model's config.json."""

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(), indent=2) + "\n").encode()


@dataclass(frozen=True, slots=True)
class Pretrained:
    run_directory: RunDirectory
    config: ModelConfig
    model: Transformer  # fp32, in evaluation mode
    tokenizer: Tokenizer
    sequence_length: int
    checkpoint: Checkpoint
    source: ImportSource | None  # None for a run

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding that are not padding."""
        return self.config.vocabulary or self.tokenizer.vocabulary


def load_pretrained(run_directory: RunDirectory) -> Pretrained:
    """Load the newest valid checkpoint of a run, or an imported model.

    Raises InputError if there is no checkpoint, CheckpointError if all are damaged, or another model's.
    """
    source = None
    if (run_directory.path / SOURCE_FILE).exists():
        source, config = _read_import(run_directory.path)
        end_of_text, sequence_length, remedy = source.end_of_text, source.sequence_length, "Import again."
    else:
        run = run_directory.config()
        config, end_of_text, sequence_length = run.model, run.tokenizer.end_of_text, run.data.sequence_length
        remedy = f"Run manta resume {run_directory.quoted} first."
    newest = catalog.load_newest_weights(run_directory.open_checkpoints())
    if newest is None:
        raise InputError(f"{run_directory.open_checkpoints()}: expected a checkpoint, got none. {remedy}")
    checkpoint, weights = newest
    file = run_directory.tokenizer_file if source or run_directory.tokenizer_file.exists() else run_directory.prepared().tokenizer
    tokenizer = Tokenizer(file, end_of_text=end_of_text)
    if beyond := size_beyond(config, [tuple(tensor.shape) for tensor in weights.values()]):
        raise CheckpointError(f"{checkpoint.location}: {': '.join(beyond)}")
    with torch.device("meta"):
        model = build_model(config, vocabulary=tokenizer.vocabulary, sequence_length=sequence_length, code=run_directory.code)
    _fill_weights(model, weights, checkpoint.location)
    return Pretrained(run_directory, config, model.eval(), tokenizer, sequence_length, checkpoint, source)


def model_tensors(model: Transformer) -> dict[str, Tensor]:
    """Return each tensor of a trained model once: parameters, and the router biases, which have no gradient."""
    biases = {f"{name}.bias": router.bias for name, router in model.routers() if router.bias is not None}
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | biases


def size_beyond(config: ModelConfig, shapes: Collection[tuple[int, ...]]) -> tuple[str, str] | None:
    """Return a key of the model section and why no model with tensors of these shapes has its value; None if one might.

    To build a model takes time for each block, and memory for each weight: this takes none.
    """
    if ":" in config.family:
        return None  # the user's class may use any key as it likes
    tensors, weights = len(shapes), sum(map(math.prod, shapes))
    experts, width, layers = config.experts, config.width, config.layers
    least = {"layers": layers, "vocabulary": config.vocabulary or 1, "positions": config.positions or 1}
    least |= {"heads": layers * config.heads * config.head_dim, "kv_heads": layers * config.kv * config.head_dim}
    if experts is None:
        least["mlp_width"] = layers * config.inner_width
    else:
        least |= {"experts.experts": layers * experts.experts, "experts.width": layers * experts.width}
        least["experts.shared"] = layers * experts.shared * experts.width
    key, rows = max(least.items(), key=lambda item: item[1])
    if layers > tensors:
        return "layers", f"expected at most {tensors}, the number of stored tensors, got {layers}"
    if rows * width > weights:
        return key, f"expected a size for the {weights:,} stored weights, got one for at least {rows * width:,}"
    return None


def start_difference(
    start: str, config: ModelConfig, *, vocabulary: int, sequence_length: int, code: Path, match_tokens: bool = False
) -> str | None:
    """Return the first difference between the weights of the checkpoint at `start` and this model's; None if they fit.

    match_tokens: the vocabularies may differ. Raises CheckpointError if there is no such checkpoint.
    """
    storage, name = resolve_start_from(start)
    assert name is not None, f"{start}: not the name of one checkpoint"
    shapes = catalog.read_manifest(storage, name).shapes
    with torch.device("meta"):
        expected = _shapes(model_tensors(build_model(config, vocabulary=vocabulary, sequence_length=sequence_length, code=code)))
    found = {key.removeprefix("master/"): shape for key, shape in shapes.items() if key.startswith("master/")}
    if match_tokens:
        rows = [key for key in found.keys() & expected.keys() if TOKEN_ROWS.fullmatch(f"master/{key}")]
        found |= {key: expected[key] for key in rows if expected[key][1:] == found[key][1:]}
    return None if expected == found else first_difference(expected, found)


def _fill_weights(model: Transformer, weights: dict[str, Tensor], location: str) -> None:
    """Load weights into a model on the meta device. Raises CheckpointError if they are another model's."""
    expected, found = _shapes(model_tensors(model)), _shapes(weights)
    if expected != found:
        raise CheckpointError(f"{location}: {cut(first_difference(expected, found))}")
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != name}
    model.load_state_dict(weights, assign=True, strict=False)
    for name, original in tied.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(original))
    for name, router in model.routers():
        router.bias = weights.get(f"{name}.bias")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _read_import(directory: Path) -> tuple[ImportSource, ModelConfig]:
    file = directory / SOURCE_FILE
    try:
        source = ImportSource.model_validate_json(read_regular(file, MAX_SOURCE_BYTES))
        file = directory / MODEL_FILE
        return source, ModelConfig.model_validate_json(json.dumps(upgrade(read_yaml(file), "model")), strict=True)
    except (OSError, TypeError, ValidationError) as error:
        message = one_line(error)
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_input=False)[0]
            message = cut(": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]])))
        raise InputError(f"{file}: expected the file that manta import wrote, got an error: {message}. Import again.") from None
