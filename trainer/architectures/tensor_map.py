"""Which of our tensors are which of theirs, and what is done to them on the way: rows of a table, bound to a model's names.

Shapes: D width, F inner width, E experts, V vocabulary.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manta.trainer.model.transformer import Transformer

Tensors = Sequence[Tensor]
VOCABULARY_FIRST = {"embedding.weight", "head.weight", "head.bias"}  # their rows from the vocabulary up are padding, ours alone


@dataclass(frozen=True, slots=True)
class Change:
    to_theirs: Callable[[Tensors], Tensors]
    to_ours: Callable[[Tensors], Tensors]


SAME = Change(lambda ours: ours, lambda theirs: theirs)
TRANSPOSED = Change(lambda ours: [t.T for t in ours], lambda theirs: [t.T for t in theirs])
JOINED = Change(lambda ours: [torch.cat(list(ours))], lambda theirs: theirs[0].chunk(3))
JOINED_TRANSPOSED = Change(lambda ours: [torch.cat(list(ours)).T], lambda theirs: theirs[0].T.chunk(3))
EACH_EXPERT = Change(lambda ours: ours[0].unbind(), lambda theirs: [torch.stack(list(theirs))])
# Of BERT, untied: transformers keeps the bias twice, and reads the one beside the weight.
UNTIED_HEAD = Change(lambda ours: [*ours, ours[1]], lambda theirs: theirs[:2])


@dataclass(frozen=True, slots=True)
class Row:
    """Names, several with a blank between; {i} stands for the number of a block, {e} for that of an expert."""

    ours: str
    theirs: str
    change: Change = SAME


def affine(ours: str, theirs: str, change: Change = SAME) -> tuple[Row, Row]:
    """A weight and its bias, of the same names but for the ending. What transposes a weight leaves its bias."""
    of_bias = {TRANSPOSED: SAME, JOINED_TRANSPOSED: JOINED}.get(change, change)
    return (
        Row(" ".join(f"{name}.weight" for name in ours.split()), f"{theirs}.weight", change),
        Row(" ".join(f"{name}.bias" for name in ours.split()), f"{theirs}.bias", of_bias),
    )


@dataclass(frozen=True, slots=True)
class Link:
    """A row for one block."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    change: Change

    def export(self, ours: Mapping[str, Tensor], vocabulary: int) -> dict[str, Tensor]:
        """Theirs, by name; views where nothing has to be moved."""
        held = [ours[name][:vocabulary] if name in VOCABULARY_FIRST else ours[name] for name in self.ours]
        return dict(zip(self.theirs, self.change.to_theirs(held), strict=True))

    def take(self, theirs: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Ours, by name, without the padding of the vocabulary."""
        return dict(zip(self.ours, self.change.to_ours([theirs(name) for name in self.theirs]), strict=True))


def bind(rows: Iterable[Row], names: Iterable[str], *, layers: int, experts: int) -> list[Link]:
    """The rows that the model has tensors for, block by block. Every one of `names` is in one of them."""
    left, links = set(names), list[Link]()
    for row in rows:
        for i in range(layers) if "{i}" in row.ours else [0]:
            ours = tuple(name.replace("{i}", str(i)) for name in row.ours.split())
            if not left.issuperset(ours):
                continue
            theirs = [name.replace("{i}", str(i)) for name in row.theirs.split()]
            each = [name.replace("{e}", str(e)) for name in theirs for e in (range(experts) if "{e}" in name else [0])]
            links.append(Link(ours, tuple(each), row.change))
            left.difference_update(ours)
    assert not left, f"no row for {sorted(left)}"
    return sorted(links, key=lambda link: int(found[1]) if (found := re.match(r"blocks\.(\d+)\.", link.ours[0])) else -1)


def tensors(model: Transformer) -> dict[str, Tensor]:
    """All that a trained model is, each tensor once: parameters, and the biases that mixtures are balanced by without a gradient."""
    biases = {f"{name}.bias": router.bias for name, router in model.routers() if router.bias is not None}
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | biases
