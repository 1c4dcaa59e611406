"""What a model reads: one micro batch, or a sequence-parallel rank's part of it.

Shapes: B sequences, T tokens here, S tokens of the whole sequence (T = S unless sequences are cut over ranks).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from manta.data.hashing import fold, hashed
from manta.data.objectives.causal import IGNORED, Examples

__all__ = ["IGNORED", "Batch"]


_NOISE = 2  # dropout's stream of hashes, beside those that examples are drawn from


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    tokens: Tensor  # [B, T]
    targets: Tensor  # [B, T], IGNORED where nothing is to be predicted
    positions: Tensor  # [B, T]: of each token in its sequence, or in its document where documents are kept apart
    keys: Tensor  # [B]: of (run seed, sample number, part of the sample): with the place, all that dropout depends on
    documents: Tensor | None = None  # [B, S]: a token sees those of its own document; padding has -1; None: all is one document
    segments: Tensor | None = None  # [B, T]: BERT's token types
    parts: int = 1  # that the sequence is cut into
    offset: int = 0  # where this part begins in it
    next_sentence: Tensor | None = None  # [B]: 0 where the second part follows the first, 1 where it does not

    @classmethod
    def of(cls, examples: Examples, *, seed: int) -> Self:
        """On the CPU, its memory shared with the examples. seed: the run's."""
        given = {field.name: getattr(examples, field.name, None) for field in fields(cls)}
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in given.items() if array is not None}
        keys = hashed(seed, _NOISE, examples.samples)
        if examples.cut is not None:
            keys = fold(keys, examples.cut)
        return cls(**tensors, keys=torch.from_numpy(keys.view(np.int64)))

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        return self._each(lambda tensor: tensor.pin_memory())

    def part(self, index: int, of: int) -> "Batch":
        """The `index`th of `of` equal parts along the sequence. Documents stay whole: attention sees the whole sequence."""
        if of == 1:
            return self

        def cut(tensor: Tensor) -> Tensor:
            return tensor.chunk(of, dim=1)[index].contiguous()

        return replace(
            self,
            tokens=cut(self.tokens),
            targets=cut(self.targets),
            parts=of,
            offset=index * (self.tokens.shape[1] // of),
            positions=cut(self.positions),
            segments=None if self.segments is None else cut(self.segments),
        )

    @property
    def length(self) -> int:
        """S: of the whole sequence."""
        return self.parts * self.tokens.shape[1]

    @property
    def places(self) -> Tensor:
        """[B, T]: of each token in its sequence, whatever its position is said to be."""
        T = self.tokens.shape[1]
        return torch.arange(self.offset, self.offset + T, device=self.tokens.device).expand_as(self.tokens)

    @property
    def real(self) -> Tensor | None:
        """[B, T], False for padding; None where there is none."""
        if self.documents is None:
            return None
        return self.documents[:, self.offset : self.offset + self.tokens.shape[1]] >= 0

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(tensor) for name, tensor in held.items() if isinstance(tensor, Tensor)})
