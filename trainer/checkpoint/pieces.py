"""From a rank's flat fragment to rectangles of the whole tensor.

A rank holds a part of each parameter, and under ZeRO a flat range of that part. A flat range of a row-major tensor is a short
list of rectangles, each contiguous in memory, so each is a view and nothing is copied. Given to torch DCP as chunks of the whole
tensor they are written, and read back under any other cut. Of pieces that several ranks hold, DCP has one write each: the one that
has the least to write so far.

Private parts relied on: DCP's _Checkpointable protocol (the three dunder methods of `Pieces`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True, slots=True)
class Rectangle:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


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


class Pieces(torch.Tensor):
    """What this rank holds of one whole tensor: `flat`, which begins at `start` of the part of shape `held` at `offsets` of the whole."""

    @staticmethod
    def __new__(  # noqa: PYI034  a static method knows no Self
        cls: "type[Pieces]", whole: Sequence[int], flat: Tensor, *, held: Sequence[int], offsets: Sequence[int], start: int
    ) -> "Pieces":
        del held, offsets, start
        wrap: Any = torch.Tensor._make_wrapper_subclass  # noqa: SLF001
        return wrap(cls, torch.Size(whole), dtype=flat.dtype, device=flat.device)

    def __init__(self, whole: Sequence[int], flat: Tensor, *, held: Sequence[int], offsets: Sequence[int], start: int) -> None:
        super().__init__()
        self.whole = torch.Size(whole)
        self.chunks: list[ChunkStorageMetadata] = []
        self.views: list[Tensor] = []
        position = 0
        for rectangle in rectangles(held, start, start + flat.numel()):
            count = math.prod(rectangle.sizes)
            place = torch.Size(map(add, offsets, rectangle.offsets))
            self.views.append(flat.narrow(0, position, count).view(rectangle.sizes))
            self.chunks.append(ChunkStorageMetadata(offsets=place, sizes=torch.Size(rectangle.sizes)))
            position += count

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(f"{func} on pieces of a tensor: they are for saving and loading alone")

    def __repr__(self, *, tensor_contents: object = None) -> str:
        del tensor_contents
        return f"Pieces({tuple(self.whole)}, {self.chunks})"

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets, index),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=TensorProperties.create_from_tensor(view), size=self.whole),
            )
            for index, (chunk, view) in enumerate(zip(self.chunks, self.views, strict=True))
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self.chunks

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(view for chunk, view in zip(self.chunks, self.views, strict=True) if chunk.offsets == index.offset)
