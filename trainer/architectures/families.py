"""The model classes of transformers that compute exactly what one of our models computes. Any other class is refused.

To add one: a row in dense.py, moe.py or a new file, and its name here.
"""

from collections.abc import Collection, Iterator

from manta.data.errors import InputError
from manta.trainer.architectures.architecture import Architecture
from manta.trainer.architectures.bert import BERT
from manta.trainer.architectures.dense import LLAMA, MISTRAL, QWEN3
from manta.trainer.architectures.gpt2 import GPT2
from manta.trainer.architectures.moe import GLM4_MOE, MIXTRAL, QWEN3_MOE
from manta.trainer.architectures.tensor_map import TensorMapping, bind
from manta.trainer.config.model import ModelConfig

ARCHITECTURES = {
    architecture.model_type: architecture for architecture in (LLAMA, MISTRAL, QWEN3, MIXTRAL, QWEN3_MOE, GLM4_MOE, GPT2, BERT)
}
"""By model_type. Of several that fit a config, the first is used."""


def architecture_for(config: ModelConfig) -> Architecture:
    """Return the class that computes what a model of this config computes. Raises InputError if there is none."""
    of_family = [architecture for architecture in ARCHITECTURES.values() if architecture.family == config.family]
    if not of_family:
        raise InputError(f"model.family: expected llama, gpt2 or bert, got {config.family!r}. Export a model of one of these.")
    candidates = [architecture for architecture in of_family if architecture.has_experts == (config.experts is not None)]
    if not candidates:
        raise InputError(f"model.experts: expected none for {config.family} in transformers, got some. Export a model without experts.")
    conflicts, closest = min(((list(_conflicts(each, config)), each) for each in candidates), key=lambda pair: len(pair[0]))
    if conflicts:
        raise InputError(f"{conflicts[0]}. Train a model that {closest.name}, the closest class of transformers, supports.")
    return closest


def _conflicts(architecture: Architecture, config: ModelConfig) -> Iterator[str]:
    flat = flatten(config)
    for key, values in architecture.requires.items():
        if flat[key] not in values:
            expected = " or ".join("none" if value is None else repr(value) for value in values)
            yield f"model.{key}: expected {expected}, got {flat[key]!r}"
    if architecture.needs_shared_expert and not flat["experts.shared"]:
        yield "model.experts.shared: expected at least 1, got 0"
    if architecture.needs_divisible_width and config.width % config.heads:
        yield f"model.heads: expected a divisor of model.width ({config.width}), got {config.heads}"


def flatten(config: ModelConfig) -> dict[str, object]:
    """Return the model section by dotted key."""
    flat = config.model_dump(mode="json")
    experts: dict[str, object] = flat.pop("experts") or {}
    return flat | {f"experts.{key}": value for key, value in experts.items()}


def map_tensors(architecture: Architecture, config: ModelConfig, names: Collection[str]) -> list[TensorMapping]:
    """Return the mappings of a model with these tensor names: first those outside of blocks, then block by block."""
    rows = [("", "", row) for row in architecture.tensors]
    for i in range(config.layers):
        rows += [(f"blocks.{i}.", f"{architecture.block}.{i}.", row) for row in architecture.block_tensors]
    return bind(rows, names, experts=config.experts.experts if config.experts else 0)
