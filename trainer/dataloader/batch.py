"""What a model reads: one micro batch, or a Ulysses rank's shard of it.

Shapes: B sequences, T tokens on this rank, S tokens of the whole sequence (T = S unless sequences are sharded).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from manta.data.hashing import fold, hashed
from manta.data.objectives.examples import IGNORED, Examples

__all__ = ["IGNORED", "Batch"]

_NOISE = 2  # the hash domain of dropout; examples have others


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    tokens: Tensor  # [B, T]
    targets: Tensor  # [B, T], IGNORED if nothing is to be predicted
    positions: Tensor  # [B, T]: each token's position in its sequence, or in its document if documents are separated
    keys: Tensor  # [B]: hashes of (run seed, sample number, part of the sample), on which dropout depends, with the token's index
    documents: Tensor | None = None  # [B, S]: a token attends to its own document; padding has -1; None: to the whole sequence
    segments: Tensor | None = None  # [B, T]: BERT's token types
    shards: int = 1  # into which sequences are cut
    offset: int = 0  # the index in the sequence of this shard's first token
    sources: Tensor | None = None  # [B]: the source that each sequence is from; None: of several at once
    next_sentence: Tensor | None = None  # [B]: 0 if the second part follows the first, 1 if it does not

    @classmethod
    def from_examples(cls, examples: Examples, *, seed: int) -> Self:
        """Return a batch on the CPU that shares memory with the examples. seed: the run's."""
        arrays = {field.name: getattr(examples, field.name, None) for field in fields(cls)}
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}
        keys = hashed(seed, _NOISE, examples.samples)
        if examples.part is not None:
            keys = fold(keys, examples.part)
        return cls(**tensors, keys=torch.from_numpy(keys.view(np.int64)))

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(lambda tensor: tensor.pin_memory())

    def shard(self, index: int, count: int) -> "Batch":
        """Return one of `count` equal shards along the sequence. `documents` stays whole, because attention sees the whole sequence."""
        if count == 1:
            return self
        whole = {name: getattr(self, name) for name in ("tokens", "targets", "positions", "segments")}
        parts = {name: tensor.chunk(count, dim=1)[index].contiguous() for name, tensor in whole.items() if tensor is not None}
        return replace(self, **parts, shards=count, offset=index * (self.tokens.shape[1] // count))

    @property
    def length(self) -> int:
        """S: tokens of the whole sequence."""
        return self.shards * self.tokens.shape[1]

    @property
    def token_indices(self) -> Tensor:
        """[B, T]: each token's index in its sequence, also if positions restart in each document."""
        T = self.tokens.shape[1]
        return torch.arange(self.offset, self.offset + T, device=self.tokens.device).expand_as(self.tokens)

    @property
    def real(self) -> Tensor | None:
        """[B, T], False for padding; None if there is no padding."""
        if self.documents is None:
            return None
        return self.documents[:, self.offset : self.offset + self.tokens.shape[1]] >= 0

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if isinstance(value, Tensor)})
