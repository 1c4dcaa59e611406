"""From a rank's flat fragment to rectangles of the whole tensor.

A rank holds a part of each parameter, and under ZeRO a flat range of that part. A flat range of a row-major tensor is a short list of
rectangles, each contiguous in memory, so each is a view and nothing is copied. Rectangles of the whole are what a checkpoint stores, and
what is read back under any other cut.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Rectangle:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(offset, offset + size) for offset, size in zip(self.offsets, self.sizes, strict=True))

    def overlap(self, other: "Rectangle") -> "Rectangle | None":
        """What both hold."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        ends = (min(a + s, b + t) for a, s, b, t in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True))
        sizes = tuple(end - offset for end, offset in zip(ends, offsets, strict=True))
        return Rectangle(offsets, sizes) if all(size > 0 for size in sizes) else None

    def within(self, outer: "Rectangle") -> "Rectangle":
        """The same, counted from where `outer` begins."""
        return Rectangle(tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True)), self.sizes)


def rectangles(shape: Sequence[int], start: int, stop: int) -> list[Rectangle]:
    """The flat range [start, stop) of a row-major tensor of `shape`, as rectangles in order, each contiguous: at most 2 ndim - 1."""
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [Rectangle((start,) * len(shape), (stop - start,) * len(shape))]
    row = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        return _within(first, rectangles(shape[1:], head, tail))
    found: list[Rectangle] = []
    if head:
        found += _within(first, rectangles(shape[1:], head, row))
        first += 1
    if last > first:
        found.append(Rectangle((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    if tail:
        found += _within(last, rectangles(shape[1:], 0, tail))
    return found


def _within(row: int, inner: list[Rectangle]) -> list[Rectangle]:
    return [Rectangle((row, *r.offsets), (1, *r.sizes)) for r in inner]
