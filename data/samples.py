"""Samples by number: which tokens stand in sample g of a run, for any g, from any rank, at once.

Each source's train shards, end to end, are one stream of tokens, read in windows. A causal window w is tokens [w T, w T + T + 1): T inputs
and the T targets one further on, so that neighbours share one token and every token is predicted once an epoch. A masked one is tokens
[w W, w W + W), which [CLS] and two [SEP] fill up to T. Sample g is made of the window that the order puts at g.
Legend: K samples asked for, T sequence length, W width of a window.
"""

import math
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manta.data import manifest, objectives
from manta.data.config import DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.manifest import Manifest, Prepared, Split
from manta.data.objectives import Examples
from manta.data.order import Order
from manta.data.shards import dtype_for, map_tokens
from manta.data.tokenizer import SpecialTokens, Tokenizer

_OPEN_SHARDS = 256  # mapped at a time: each holds a file descriptor


class Stream:
    """The tokens of one split of one corpus, end to end over its shards."""

    def __init__(self, directory: Path, split: Split, vocabulary: int) -> None:
        self.tokens = split.tokens
        self._starts = np.array([0, *accumulate(shard.tokens for shard in split.shards)], dtype=np.int64)
        self._files = [directory / shard.file for shard in split.shards]
        self._dtype = dtype_for(vocabulary)
        self._map = lru_cache(_OPEN_SHARDS)(self._open)

    def gather(self, starts: NDArray[np.int64], out: NDArray[np.int64]) -> None:
        """Tokens [start, start + width) for each start [K] -> the rows of out [K, width]."""
        width = out.shape[1]
        shards = np.searchsorted(self._starts, starts, side="right") - 1
        offsets = starts - self._starts[shards]
        for row, shard, offset in zip(out, shards.tolist(), offsets.tolist(), strict=True):
            piece = self._map(shard)[offset : offset + width]
            if len(piece) == width:
                row[:] = piece
            else:
                row[:] = self._across(shard, offset, width)

    def _open(self, shard: int) -> NDArray[Any]:
        return map_tokens(self._files[shard], self._dtype)

    def _across(self, shard: int, offset: int, width: int) -> NDArray[np.int64]:
        """A window that begins in one shard and ends in another."""
        parts: list[NDArray[np.integer]] = []
        while width:
            part = self._map(shard)[offset : offset + width]
            parts.append(part)
            shard, offset, width = shard + 1, 0, width - len(part)
        return np.concatenate(parts).astype(np.int64)


class Windows:
    """The windows of several streams, numbered through."""

    def __init__(self, streams: list[Stream], *, width: int, stride: int) -> None:
        self._streams = streams
        self._stride = stride
        counts = [max(0, stream.tokens - width + stride) // stride for stream in streams]
        self._starts = np.array([0, *accumulate(counts)], dtype=np.int64)
        self.width = width
        self.counts = counts
        self.total = sum(counts)

    def read(self, windows: NDArray[np.integer]) -> NDArray[np.int64]:
        """Windows [K] in range(total) -> tokens [K, W]."""
        windows = np.asarray(windows, dtype=np.int64)
        if windows.size and (windows.min() < 0 or windows.max() >= self.total):
            raise IndexError(f"windows {windows.min()} to {windows.max()}: there are {self.total}")
        tokens_KW = np.empty((len(windows), self.width), dtype=np.int64)
        if len(self._streams) == 1:
            self._streams[0].gather(windows * self._stride, tokens_KW)
            return tokens_KW
        sources = np.searchsorted(self._starts, windows, side="right") - 1
        for source in np.unique(sources):
            here = np.flatnonzero(sources == source)
            rows = np.empty((len(here), self.width), dtype=np.int64)
            self._streams[source].gather((windows[here] - self._starts[source]) * self._stride, rows)
            tokens_KW[here] = rows
        return tokens_KW


class Samples:
    """A run's samples. Opening reads the manifests and the sizes of the shards; shards are mapped when they are asked for."""

    def __init__(self, prepared: Prepared, data: DataConfig, tokens: TokenizerConfig, *, seed: int) -> None:
        """Raises InputError where a shard is missing, truncated or not the one prepared, where text is too short for a sample, or
        where the tokenizer lacks what the objective needs.
        """
        self._prepared = prepared
        self._seed = seed
        self._share = data.mask_share
        self._end_of_text: int | None = None  # where documents are kept apart
        self._special: SpecialTokens | None = None  # where the objective is masked
        width = data.sequence_length + 1
        self._new = data.sequence_length  # tokens of a window that the one before it does not hold
        manifests = manifest.load_checked(prepared)
        if data.objective == "masked" or data.separate_documents:
            tokenizer = Tokenizer(prepared.tokenizer, end_of_text=tokens.end_of_text)
            if data.objective == "masked":
                self._special = tokenizer.special_tokens()
                width = self._new = data.sequence_length - objectives.FRAME
            else:
                self._end_of_text = tokenizer.end_of_text
        corpora = list(zip(prepared.corpora, manifests, strict=True))
        train = [Stream(at, corpus.train, corpus.vocabulary) for at, corpus in corpora]
        validation = [Stream(at, corpus.validation, corpus.vocabulary) for at, corpus in corpora]
        self._train = Windows(train, width=width, stride=self._new)
        self._validation = Windows(validation, width=width, stride=self._new)
        _check_enough(manifests, self._train, self._validation, data.sequence_length)
        self._order = Order(self._train.total, seed)
        self.sequence_length = data.sequence_length
        self.tokenizer_vocabulary = max(corpus.vocabulary for corpus in manifests)
        self.train_windows = self._train.total
        self.validation_windows = self._validation.total

    def train(self, numbers: NDArray[np.integer]) -> Examples:
        """The examples of global sample numbers [K], of any epoch."""
        _, windows = self._order(numbers)
        return self._examples(self._train, windows.astype(np.int64), numbers, self._seed)

    def validation(self, indices: NDArray[np.integer]) -> Examples:
        """Those of the validation windows [K] in range(validation_windows), in the corpus's own order; the same for every seed."""
        return self._examples(self._validation, indices, indices, None)

    def validation_text(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Validation windows [K] -> tokens [K, W] as they stand in the corpus."""
        return self._validation.read(indices)

    def validation_unigram_entropy(self, indices: NDArray[np.integer]) -> float:
        """Nats a token: the loss on these windows' text of a model that knows its token frequencies and nothing else."""
        text = self.validation_text(indices)[:, -self._new :]
        return entropy(np.bincount(text.ravel(), minlength=self.tokenizer_vocabulary))

    def _examples(self, windows: Windows, at: NDArray[np.integer], numbers: NDArray[np.integer], seed: int | None) -> Examples:
        samples, at = np.asarray(numbers, dtype=np.int64), np.asarray(at, dtype=np.int64)
        text_KW = windows.read(at)
        if self._special is None:
            return objectives.causal(text_KW, samples, end_of_text=self._end_of_text)
        drawn = objectives.pairs(samples, at, count=windows.total, seed=seed)
        second_KW = windows.read(drawn.following)
        return objectives.masked(text_KW, second_KW, drawn, samples, share=self._share, special=self._special)

    def verify(self) -> None:
        """Read every byte and compare hashes. Raises InputError where one has changed since the corpus was prepared."""
        manifest.load_checked(self._prepared, contents=True)


def entropy(counts: NDArray[np.integer]) -> float:
    """Of the distribution that these counts [V] are, in nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _check_enough(manifests: tuple[Manifest, ...], train: Windows, validation: Windows, sequence_length: int) -> None:
    wanted = train.width
    for corpus, count in zip(manifests, train.counts, strict=True):
        if not count:
            raise InputError(
                f"data.sequence_length: {corpus.source!r} has {corpus.train.tokens} train tokens; a sample of {sequence_length}"
                f" wants {wanted}: give more text or lower data.sequence_length"
            )
    if validation.total:
        return
    held = max(corpus.validation.tokens for corpus in manifests)
    tokens = max(corpus.train.tokens + corpus.validation.tokens for corpus in manifests)
    documents = max(corpus.train.documents + corpus.validation.documents for corpus in manifests)
    now = max(corpus.validation_share for corpus in manifests)
    # Documents fall to either side by chance: aim at twice the tokens that are needed, at three documents, and above what did not do.
    share = math.ceil(100 * max(2 * wanted / tokens, 3 / documents, 2 * now)) / 100
    remedy = f"raise data.validation from {now:g} to {share:g}" if share < 0.5 else "give more documents"
    raise InputError(f"data.validation: {held} tokens are held out; a sample of {sequence_length} wants {wanted}: {remedy}")
