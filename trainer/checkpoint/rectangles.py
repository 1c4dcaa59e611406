"""A rank's flat fragments of parameters, as rectangles of the whole tensors.

A rank holds a part of each parameter, and under ZeRO a flat range of that part. A flat range of a row-major tensor is a short list of
rectangles. Each is contiguous in memory, so it is a view, and nothing is copied. Checkpoints store rectangles of whole tensors, which can
be read under any other layout.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import add
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads manifests without torch
    import torch
    from torch import Tensor


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
        offsets = tuple(map(max, self.offsets, other.offsets))
        ends = (min(a + s, b + t) for a, s, b, t in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True))
        sizes = tuple(end - offset for end, offset in zip(ends, offsets, strict=True))
        return Rectangle(offsets, sizes) if all(size > 0 for size in sizes) else None

    def within(self, outer: "Rectangle") -> "Rectangle":
        """Return the same rectangle with offsets relative to those of `outer`."""
        return Rectangle(tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True)), self.sizes)


@dataclass(frozen=True, slots=True)
class TensorViews:
    """The rectangles of one whole tensor that this rank holds, as views of its memory: saving reads them, loading writes them."""

    shape: tuple[int, ...]  # of the whole tensor
    dtype: "torch.dtype"
    views: "tuple[tuple[Rectangle, Tensor], ...]"

    @classmethod
    def from_flat(
        cls, shape: Sequence[int], flat: "Tensor", *, local_shape: Sequence[int], offsets: Sequence[int], start: int
    ) -> "TensorViews":
        """Return views of `flat` [n], which starts at element `start` of a part of this local shape, at these offsets of the whole."""
        return cls(tuple(shape), flat.dtype, tuple(_views(flat, local_shape, offsets, start)))

    @classmethod
    def from_whole(cls, tensor: "Tensor") -> "TensorViews":
        """Return the one view of a tensor that this rank holds whole. Raises RuntimeError unless it is contiguous."""
        return cls.from_flat(tensor.shape, tensor.view(-1), local_shape=tensor.shape, offsets=(0,) * tensor.ndim, start=0)


def _views(flat: "Tensor", local_shape: Sequence[int], offsets: Sequence[int], start: int) -> "Iterator[tuple[Rectangle, Tensor]]":
    position = 0
    for local in rectangles(local_shape, start, start + flat.numel()):
        rectangle = Rectangle(tuple(map(add, offsets, local.offsets)), local.sizes)
        yield rectangle, flat.narrow(0, position, rectangle.count).view(rectangle.sizes)
        position += rectangle.count


def cover_once(parts: Sequence[Rectangle], shape: tuple[int, ...]) -> bool:
    """Return whether the parts cover each element of a tensor of this shape exactly once. Takes time in proportion to their number.

    A sum of boxes is known by its corners, with signs that alternate along each edge: differentiate it once in every direction. So the
    parts' corners must cancel but for those of the whole.
    """
    whole = Rectangle((0,) * len(shape), shape)
    if list(parts) == [whole]:
        return True
    corners: defaultdict[tuple[int, ...], int] = defaultdict(int)
    for rectangle, weight in chain([(whole, -1)], ((part, 1) for part in parts)):
        for corner, sign in _corners(rectangle):
            corners[corner] += weight * sign
    return not any(corners.values())


def _corners(rectangle: Rectangle) -> list[tuple[tuple[int, ...], int]]:
    corners: list[tuple[tuple[int, ...], int]] = [((), 1)]
    for offset, size in zip(rectangle.offsets, rectangle.sizes, strict=True):
        corners = [((*corner, x), sign * end) for corner, sign in corners for x, end in ((offset, 1), (offset + size, -1))]
    return corners


def rectangles(shape: Sequence[int], start: int, stop: int) -> list[Rectangle]:
    """Return the flat range [start, stop) of a row-major tensor as contiguous rectangles, in order: at most 2 ndim - 1."""
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [Rectangle((start,) * len(shape), (stop - start,) * len(shape))]
    row = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        return _in_row(first, rectangles(shape[1:], head, tail))
    full = first + 1 if head else first  # the first whole row
    result = _in_row(first, rectangles(shape[1:], head, row)) if head else []
    if last > full:
        result.append(Rectangle((full, *(0 for _ in shape[1:])), (last - full, *shape[1:])))
    return result + _in_row(last, rectangles(shape[1:], 0, tail))


def _in_row(row: int, inner: list[Rectangle]) -> list[Rectangle]:
    return [Rectangle((row, *r.offsets), (1, *r.sizes)) for r in inner]
