"""One model class of transformers, and which of our tensors are which of its tensors. families.yaml has all classes.

Shapes: D width, F inner width, E experts, V vocabulary.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from manta.data.errors import InputError, cut
from manta.trainer.config.model import ModelConfig
from manta.trainer.config.yaml_file import read_yaml

Tensors = Sequence[Tensor]
VOCABULARY_ROWS = {"embedding.weight", "head.weight", "head.bias"}  # first dimension V; only ours may be padded


@dataclass(frozen=True, slots=True)
class Transform:
    to_hf: Callable[[Tensors], Tensors]
    from_hf: Callable[[Tensors], Tensors]


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.ndim == 2 else tensor  # a bias stays


TRANSFORMS = {
    "identity": Transform(lambda ours: ours, lambda hf: hf),
    "transpose": Transform(lambda ours: [_transpose(t) for t in ours], lambda hf: [_transpose(t) for t in hf]),
    "fuse_transpose": Transform(lambda ours: [_transpose(torch.cat(list(ours)))], lambda hf: _transpose(hf[0]).chunk(3)),
    "split_experts": Transform(lambda ours: ours[0].unbind(), lambda hf: [torch.stack(list(hf))]),
    # transformers stores the bias of BERT's untied head twice, and reads the one beside the weight.
    "untied_head": Transform(lambda ours: [*ours, ours[1].clone()], lambda hf: hf[:2]),
}


class Entry(BaseModel):
    """An entry of families.yaml. A text or a list gives the first fields, in order."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _name_fields(cls, value: Any) -> Any:
        values = [value] if isinstance(value, str) else value
        return dict(zip(cls.model_fields, values, strict=False)) if isinstance(values, list) else value


class Key(Entry):
    """A key of config.json."""

    hf: str
    default: Any = None
    """The value that transformers uses if the key is omitted."""
    older: str | None = None
    """Its name in older files."""
    twin: str | None = None
    """A second key that must have the same value."""


class Row(Entry):
    """Names of the class's tensors or modules."""

    hf: str
    transform: str = "identity"


class Architecture(Entry):
    name: str
    model_type: str
    family: str = "llama"
    """Our model.family."""
    keys: dict[str, Key]
    """Our config keys (dotted), and the class's."""
    constants: dict[str, Any]
    """The class's keys that our family has no choice in, with the only value that fits."""
    constant_defaults: dict[str, Any] = {}
    """What transformers uses for an omitted constant, if that does not fit."""
    requires: dict[str, tuple[Any, ...]] = {}
    """Our config keys that the class lacks, with the values that fit; an import gets the first."""
    needs_divisible_width: bool = False
    """Whether width must be a multiple of heads."""
    needs_shared_expert: bool = False
    rope_theta: float | None = 1e4
    """What transformers uses if it is omitted; None for learned positions."""
    partial_rotary_factor: float | None = None
    """What transformers uses if it is omitted; None if the class has no such key."""
    has_window_switch: bool = False
    """Whether the class has use_sliding_window."""
    has_window_layers: bool = False
    """Whether the class has max_window_layers and layer_types."""
    tensors: dict[str, Row]
    """Outside of blocks: our names, and the class's."""
    block: str
    block_tensors: dict[str, Row]
    copies: dict[str, str] = {}
    """Tensors that files of a tied model may hold a second time, and the originals."""
    old_names: tuple[tuple[str, str], ...] = ()
    """Substitutions that turn tensor names of older files into today's."""
    memory_names: tuple[tuple[str, str], ...] = ()
    """Substitutions that turn tensor names of a model in memory into those of its files, if they differ."""
    buffers: str = "$."
    """Pattern for tensors in files that are not weights; the default matches nothing."""
    optional: str = "$."
    """Pattern for modules that files may lack: an import initializes them. The default matches nothing."""
    subset: str | None = None
    """The class with files that lack them."""

    @property
    def has_experts(self) -> bool:
        return "experts.experts" in self.keys


_CLASSES = map(Architecture.model_validate, read_yaml(Path(__file__).with_name("families.yaml"))["classes"])
ARCHITECTURES = {architecture.model_type: architecture for architecture in _CLASSES}
"""By model_type. Of several that fit a config, the first is used."""


class TensorMapping(NamedTuple):
    """A row for one block of one model."""

    ours: tuple[str, ...]
    hf: tuple[str, ...]
    transform: Transform

    def to_hf(self, ours: Mapping[str, Tensor], vocabulary: int | None) -> dict[str, Tensor]:
        """Return transformers' tensors by name, views if possible. vocabulary: rows that are not padding; None: all."""
        tensors = [ours[name][:vocabulary] if name in VOCABULARY_ROWS else ours[name] for name in self.ours]
        return dict(zip(self.hf, self.transform.to_hf(tensors), strict=True))

    def from_hf(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return our tensors by name, without padding of the vocabulary."""
        return dict(zip(self.ours, self.transform.from_hf([read(name) for name in self.hf]), strict=True))


def map_tensors(architecture: Architecture, config: ModelConfig, names: Collection[str]) -> list[TensorMapping]:
    """Return the mappings of a model with these tensor names, each of which is in exactly one.

    First those outside of blocks, then block by block. A row without tensors in this model is skipped.
    """
    tables = [("", "", architecture.tensors)]
    tables += [(f"blocks.{i}.", f"{architecture.block}.{i}.", architecture.block_tensors) for i in range(config.layers)]
    experts = range(config.experts.experts if config.experts else 0)
    unmapped, mappings = set(names), list[TensorMapping]()
    for prefix, hf_prefix, rows in tables:
        for (own_names, row), ending in product(rows.items(), ("", ".weight", ".bias")):
            ours = tuple(f"{prefix}{name}{ending}" for name in own_names.split())
            if unmapped.issuperset(ours):
                hf = [f"{hf_prefix}{name}{ending}" for name in row.hf.split()]
                hf = [name.replace("{e}", str(e)) for name in hf for e in (experts if "{e}" in name else [0])]
                mappings.append(TensorMapping(ours, tuple(hf), TRANSFORMS[row.transform]))
                unmapped.difference_update(ours)
    if unmapped:
        problem = f"expected a row in families.yaml for each tensor, got no row for {cut(str(sorted(unmapped)))}"
        raise InputError(f"{architecture.name}: {problem}. Import again, or add it.")
    return mappings


def hf_shapes(mappings: Iterable[TensorMapping], tensors: Mapping[str, Tensor], vocabulary: int | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of transformers' tensors by name. `tensors`: ours, by name."""
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    return {name: tuple(hf.shape) for mapping in mappings for name, hf in mapping.to_hf(meta, vocabulary).items()}


def padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a copy in fp32, with zeros for the rows that only ours has."""
    whole = torch.zeros(shape, dtype=torch.float32)
    whole[: len(tensor)].copy_(tensor)
    return whole


def substitute(name: str, patterns: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name
