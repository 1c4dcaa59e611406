"""Weights of another vocabulary, grown or in another order: the rows of embedding and head go by what a token is, not by its number."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from manta.trainer.checkpoint.manifest import Checkpoint, Chunk, Stored
from manta.trainer.checkpoint.rectangles import Rectangle
from manta.trainer.checkpoint.write_plan import TORCH

ROWS = re.compile(r"master/(embedding|head)\.(weight|bias)")
"""Keys whose first dimension is the vocabulary."""


@dataclass(frozen=True, slots=True)
class Run:
    """So many tokens that follow each other in both vocabularies."""

    there: int  # the first one's number in the other
    here: int
    count: int


def runs(there: Mapping[str, int], here: Mapping[str, int]) -> list[Run]:
    """Of the tokens that both have."""
    found: list[Run] = []
    for number, other in sorted((here[token], there[token]) for token in here.keys() & there.keys()):
        last = found[-1] if found else None
        if last and (number, other) == (last.here + last.count, last.there + last.count):
            found[-1] = replace(last, count=last.count + 1)
        else:
            found.append(Run(other, number, 1))
    return found


def matched(checkpoint: Checkpoint, alike: list[Run], wanted: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """The checkpoint as one of this vocabulary, of whose rows it holds those of tokens that both have: others keep what they hold."""
    tensors = {
        key: _rows(stored, alike, wanted[key]) if ROWS.fullmatch(key) and key in wanted else stored
        for key, stored in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def _rows(stored: Stored, alike: list[Run], shape: tuple[int, ...]) -> Stored:
    if stored.shape[1:] != shape[1:]:
        return stored  # another model's: told where it is loaded
    chunks: list[Chunk] = []
    for chunk in stored.chunks:
        first, rows = chunk.place.offsets[0], chunk.place.sizes[0]
        width = math.prod(chunk.place.sizes[1:]) * TORCH[stored.dtype].itemsize
        for run in alike:
            begin, end = max(run.there, first), min(run.there + run.count, first + rows)
            if begin < end:
                offsets = (run.here + begin - run.there, *chunk.place.offsets[1:])
                place = Rectangle(offsets, (end - begin, *chunk.place.sizes[1:]))
                chunks.append(Chunk(chunk.file, chunk.start + (begin - first) * width, place))
    return Stored(stored.dtype, shape, tuple(chunks))
