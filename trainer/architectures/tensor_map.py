"""Which tensors of our model are which of transformers', and the transform between them.

Shapes: D width, F inner width, E experts, V vocabulary.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Sequence[Tensor]
Shapes = Mapping[str, tuple[int, ...]]
VOCABULARY_ROWS = {"embedding.weight", "head.weight", "head.bias"}  # first dimension V; only ours may be padded


@dataclass(frozen=True, slots=True)
class Transform:
    to_hf: Callable[[Tensors], Tensors]
    from_hf: Callable[[Tensors], Tensors]


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.ndim == 2 else tensor  # a bias stays


IDENTITY = Transform(lambda ours: ours, lambda hf: hf)
TRANSPOSE = Transform(lambda ours: [_transpose(t) for t in ours], lambda hf: [_transpose(t) for t in hf])
FUSE_TRANSPOSE = Transform(lambda ours: [_transpose(torch.cat(list(ours)))], lambda hf: _transpose(hf[0]).chunk(3))
SPLIT_EXPERTS = Transform(lambda ours: ours[0].unbind(), lambda hf: [torch.stack(list(hf))])
# transformers stores the bias of BERT's untied head twice, and reads the one beside the weight.
UNTIED_HEAD = Transform(lambda ours: [*ours, ours[1].clone()], lambda hf: hf[:2])


@dataclass(frozen=True, slots=True)
class Row:
    """Names of tensors, or of modules: then the row maps their .weight and .bias. Several are separated by spaces.

    {e} is the number of an expert.
    """

    ours: str
    hf: str
    transform: Transform = IDENTITY


def rows(ours: str, hf: str, parts: str, transform: Transform = IDENTITY) -> tuple[Row, ...]:
    """Return a row for each part, a name that replaces * on both sides."""
    return tuple(Row(ours.replace("*", part), hf.replace("*", part), transform) for part in parts.split())


@dataclass(frozen=True, slots=True)
class TensorMapping:
    """A row for one block of one model."""

    ours: tuple[str, ...]
    hf: tuple[str, ...]
    transform: Transform

    def to_hf(self, ours: Mapping[str, Tensor], vocabulary: int) -> dict[str, Tensor]:
        """Return transformers' tensors by name, views if possible. `vocabulary`: rows that are not padding."""
        tensors = [ours[name][:vocabulary] if name in VOCABULARY_ROWS else ours[name] for name in self.ours]
        return dict(zip(self.hf, self.transform.to_hf(tensors), strict=True))

    def from_hf(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return our tensors by name, without padding of the vocabulary."""
        return dict(zip(self.ours, self.transform.from_hf([read(name) for name in self.hf]), strict=True))


def bind(prefixed: Iterable[tuple[str, str, Row]], names: Collection[str], *, experts: int) -> list[TensorMapping]:
    """Return the mappings that apply to a model with these tensor names, each of which is in exactly one.

    prefixed: rows, after the prefixes of our names and transformers'.
    """
    unmapped, mappings = set(names), list[TensorMapping]()
    for prefix, hf_prefix, row in prefixed:
        for ending in ("", ".weight", ".bias"):
            ours = tuple(f"{prefix}{name}{ending}" for name in row.ours.split())
            if unmapped.issuperset(ours):
                hf = [f"{hf_prefix}{name}{ending}" for name in row.hf.split()]
                hf = [name.replace("{e}", str(e)) for name in hf for e in (range(experts) if "{e}" in name else [0])]
                mappings.append(TensorMapping(ours, tuple(hf), row.transform))
                unmapped.difference_update(ours)
    assert not unmapped, f"no row for {sorted(unmapped)}"
    return mappings


def hf_shapes(mappings: Iterable[TensorMapping], shapes: Shapes, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of transformers' tensors by name. `shapes`: our tensors'."""
    found: dict[str, tuple[int, ...]] = {}
    for mapping in mappings:
        ours = {name: torch.empty(shapes[name], device="meta") for name in mapping.ours}
        found |= {name: tuple(tensor.shape) for name, tensor in mapping.to_hf(ours, vocabulary).items()}
    return found


def padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a copy in fp32, with zeros for the rows that only ours has."""
    whole = torch.zeros(shape, dtype=torch.float32)
    whole[: len(tensor)].copy_(tensor)
    return whole


def substitute(name: str, patterns: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name
