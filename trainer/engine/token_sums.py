"""Sums over the targets of batches, by source: the losses of each source, bits per byte, and accuracy.

Legend: S sources, V vocabulary, B sequences, T tokens, n targets that are not IGNORED.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from math import log
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from manta.trainer.dataloader.batch import IGNORED, Batch
from manta.trainer.model.layers import Head
from manta.trainer.model.losses import TokenLosses

Sums = NDArray[np.float64]


class TokenSums:
    """What heads measure of each target, summed over the batches of this rank in fp64."""

    def __init__(self, sources: int, bytes_V: NDArray[np.integer]) -> None:
        """bytes_V: bytes of text that each token stands for; 0 for special tokens."""
        self._bytes_V, self._sources = np.asarray(bytes_V, dtype=np.float64), sources
        self.values = np.zeros((len(SourceSums._fields), sources))
        """In the order of SourceSums. To reduce over ranks, add them."""

    @contextmanager
    def measure(self, model: nn.Module, batch: Batch) -> Generator[None]:
        """Add the targets of a batch, for which `model` is run inside. A model that computes its loss without a Head adds nothing."""
        heads = [module for module in model.modules() if isinstance(module, Head)]
        for head in heads:
            head.measured = []
        try:
            yield
            for head in heads:
                self._add(batch, head.measured or [])
        finally:
            for head in heads:
                head.measured = None

    def _add(self, batch: Batch, measured: Sequence[TokenLosses]) -> None:
        """A head may see all tokens, or only those with targets: their order is the same."""
        counts_BT = batch.targets != IGNORED
        targets_n = batch.targets[counts_BT].cpu().numpy()
        sources_B = torch.zeros(len(batch.tokens), dtype=torch.int64, device=counts_BT.device) if batch.sources is None else batch.sources
        sources_n = sources_B[:, None].expand_as(counts_BT)[counts_BT].cpu().numpy()
        losses, correct = (torch.cat(parts).double() for parts in zip(*measured, strict=True)) if measured else (torch.zeros(0),) * 2
        if len(losses) == counts_BT.numel():
            losses, correct = losses[counts_BT.flatten()], correct[counts_BT.flatten()]
        if len(losses) != len(targets_n):
            return
        losses_n, bytes_n = losses.cpu().numpy(), self._bytes_V[targets_n]
        columns = SourceSums(np.ones_like(losses_n), losses_n, correct.cpu().numpy(), losses_n * (bytes_n > 0), bytes_n)
        self.values += [np.bincount(sources_n, weights=column, minlength=self._sources) for column in columns]


class SourceSums(NamedTuple):
    """Sums [S] over the targets of each source."""

    targets: Sums
    losses: Sums
    """In nats."""
    correct: Sums
    text_losses: Sums
    """Of those targets that stand for text: no special tokens."""
    text_bytes: Sums

    def mean_losses(self) -> Sums:
        """Return the mean loss of each source's targets [S], in nats. Like the others: NaN for a source without any."""
        return _ratio(self.losses, self.targets)

    def accuracy(self) -> Sums:
        """Return the share of each source's targets [S] that the model found most likely."""
        return _ratio(self.correct, self.targets)

    def bits_per_byte(self) -> Sums:
        """Return how many bits the model needs for a byte of each source's text [S]. It is comparable across tokenizers."""
        return _ratio(self.text_losses, log(2) * self.text_bytes)

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the sums from `TokenSums.values`, flat, added over ranks."""
        return cls(*np.reshape(np.asarray(values, dtype=np.float64), (len(cls._fields), -1)))

    def total(self) -> "SourceSums":
        """Return the sums over all sources, as those of one."""
        return SourceSums(*(values.sum(keepdims=True) for values in self))


def _ratio(values: Sums, by: Sums) -> Sums:
    return np.divide(values, by, out=np.full_like(values, np.nan), where=by > 0)
