"""Which weight is cut over which ranks, on which dimension: the one table that sharding, checkpoints and memory estimates read.

It goes by the names that our layers give their weights. A weight that no line names is whole on every rank. A model of your own is not cut:
who gave a weight a name of these may have meant something else by it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Over = Literal["tensor", "expert"]


@dataclass(frozen=True, slots=True)
class Cut:
    """Weights whose whole name this matches are cut into equal parts on `dimension`."""

    name: str
    over: Over
    dimension: int


CUTS = (
    # Megatron-LM (Shoeybi et al. 2019), section 3: columns, then rows, so that each half of a block needs one all-reduce.
    Cut(r".*\.(q|k|v|gate|up)_proj\.(weight|bias)", "tensor", 0),
    Cut(r".*\.(o|down)_proj\.weight", "tensor", 1),
    # The vocabulary: embedding and head, tied or not.
    Cut(r"(embedding|head)\.(weight|bias)", "tensor", 0),
    # A mixture: whole experts (GShard, Lepikhin et al. 2021, section 3.2), and each expert as the MLP that it is.
    Cut(r".*\.experts\.(gate|up|down)_proj", "expert", 0),
    Cut(r".*\.experts\.(gate|up)_proj", "tensor", 1),
    Cut(r".*\.experts\.down_proj", "tensor", 2),
)


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's place among those that share weights: index and size, over each."""

    tensor: tuple[int, int] = (0, 1)
    expert: tuple[int, int] = (0, 1)


def cuts(name: str) -> list[Cut]:
    return [cut for cut in CUTS if re.fullmatch(cut.name, name)]


def is_cut(name: str, part: Part, over: Over) -> bool:
    """Whether this weight lies in parts over these ranks."""
    return getattr(part, over)[1] > 1 and any(cut.over == over for cut in cuts(name))


def local(name: str, whole: Sequence[int], part: Part) -> tuple[slice, ...]:
    """What of a weight of shape `whole` lies on this rank."""
    slices = [slice(0, size) for size in whole]
    for cut in cuts(name):
        index, of = getattr(part, cut.over)
        if of == 1:
            continue
        size, rest = divmod(whole[cut.dimension], of)
        if rest:
            raise ValueError(f"{name}: dimension {cut.dimension} of {tuple(whole)} can not be cut into {of} equal parts")
        slices[cut.dimension] = slice(index * size, (index + 1) * size)
    return tuple(slices)


def whole(name: str, held: Sequence[int], part: Part) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """From the shape of what lies on this rank: the shape of the whole, and where in it that begins."""
    shape, offsets = list(held), [0] * len(held)
    for cut in cuts(name):
        index, of = getattr(part, cut.over)
        if of == 1:
            continue
        shape[cut.dimension] *= of
        offsets[cut.dimension] = index * held[cut.dimension]
    return tuple(shape), tuple(offsets)
