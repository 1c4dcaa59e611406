"""What a rank holds of whole tensors, as views of its memory: saving reads them, loading writes them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import add

import torch
from torch import Tensor

from manta.trainer.checkpoint.rectangles import Rectangle, rectangles


@dataclass(frozen=True, slots=True)
class Pieces:
    """What this rank holds of one whole tensor: rectangles of it, and where each lies in memory."""

    whole: tuple[int, ...]
    dtype: torch.dtype
    held: tuple[tuple[Rectangle, Tensor], ...]

    @classmethod
    def of(cls, whole: Sequence[int], flat: Tensor, *, held: Sequence[int], offsets: Sequence[int], start: int) -> "Pieces":
        """`flat` [n] begins at `start` of the part of shape `held`, which lies at `offsets` of the whole."""
        return cls(tuple(whole), flat.dtype, tuple(_views(flat, held, offsets, start)))

    @classmethod
    def all_of(cls, tensor: Tensor) -> "Pieces":
        """A tensor that lies here whole. Raises RuntimeError where it is not contiguous."""
        return cls.of(tensor.shape, tensor.view(-1), held=tensor.shape, offsets=(0,) * tensor.ndim, start=0)


def _views(flat: Tensor, held: Sequence[int], offsets: Sequence[int], start: int) -> Iterator[tuple[Rectangle, Tensor]]:
    position = 0
    for rectangle in rectangles(held, start, start + flat.numel()):
        place = Rectangle(tuple(map(add, offsets, rectangle.offsets)), rectangle.sizes)
        yield place, flat.narrow(0, position, rectangle.count).view(rectangle.sizes)
        position += rectangle.count
