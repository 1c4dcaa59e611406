"""The tensors of a model by name: compared with a checkpoint's, and filled from one."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.manifest import first_difference
from manta.trainer.checkpoint.token_rows import TOKEN_ROWS
from manta.trainer.config.model import ModelConfig
from manta.trainer.model.build import build_model
from manta.trainer.model.transformer import Transformer
from manta.trainer.run_directory import resolve_start_from


def model_tensors(model: Transformer) -> dict[str, Tensor]:
    """Return each tensor of a trained model once: parameters, and the router biases, which have no gradient."""
    biases = {f"{name}.bias": router.bias for name, router in model.routers() if router.bias is not None}
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | biases


def fill_weights(model: Transformer, weights: dict[str, Tensor], location: str) -> None:
    """Load weights into a model on the meta device. Raises CheckpointError if they are another model's."""
    expected, found = _shapes(model), {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        raise CheckpointError(f"{location}: {first_difference(expected, found)}")
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != name}
    model.load_state_dict(weights, assign=True, strict=False)
    for name, original in tied.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(original))
    for name, router in model.routers():
        router.bias = weights.get(f"{name}.bias")


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
        expected = _shapes(build_model(config, vocabulary=vocabulary, sequence_length=sequence_length, code=code))
    found = {key.removeprefix("master/"): shape for key, shape in shapes.items() if key.startswith("master/")}
    if match_tokens:
        rows = [key for key in found.keys() & expected.keys() if TOKEN_ROWS.fullmatch(f"master/{key}")]
        found |= {key: expected[key] for key in rows if expected[key][1:] == found[key][1:]}
    return None if expected == found else first_difference(expected, found)


def _shapes(model: Transformer) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
