"""Samples by number: which tokens stand in sample g of a run, for any g, from any rank, at once.

g -> (source, which of its samples) by the mixture -> (epoch, window) by that source's order -> text -> what the objective makes of it.
Each step is a function of config and number alone. A causal window is T + 1 tokens, T inputs and the T targets one further on; running
text is cut every T, so that neighbours share one token and every token is predicted once an epoch. A masked one has no such overlap,
and room for [CLS] and [SEP] instead.
Legend: K samples asked for, T sequence length, W width of a window.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.objectives import masked
from manta.data.objectives.causal import Examples
from manta.data.objectives.objective import Objective, Read
from manta.data.sampling.order import Order, Permutation
from manta.data.sampling.packed_windows import Packed, Packing, packings
from manta.data.sampling.sampler import Draw, Draws
from manta.data.sampling.windows import Cut, Shape, Stream, Text
from manta.data.shards import manifest
from manta.data.shards.corpus_directory import Home
from manta.data.shards.manifest import Manifest, Prepared
from manta.data.tokenizer.tokenizer import Tokenizer

Numbers = NDArray[np.int64]
Opened = Sequence[tuple[Home, Manifest]]


class Samples:
    """A run's samples. Opening reads the manifests and the sizes of the shards; shards are mapped when they are asked for."""

    def __init__(self, prepared: Prepared, data: DataConfig, tokens: TokenizerConfig, *, seed: int) -> None:
        """Raises InputError where a shard is missing, truncated or not the one prepared, where text is too short for a sample, or
        where the tokenizer lacks what the objective needs.
        """
        self._data, self._seed = data, seed
        opened = manifest.load_checked(prepared, data.cache)
        _check_cache(data, opened)
        tokenizer = Tokenizer(prepared.tokenizer, end_of_text=tokens.end_of_text)
        self._objective = Objective(data, tokenizer)
        self._draws, self._held_out = self._windows(opened, filler=tokenizer.end_of_text)
        self._spread = Permutation(self._held_out.total, key=0)
        self.sequence_length = data.sequence_length
        self.tokenizer_vocabulary = max(corpus.vocabulary for _, corpus in opened)
        self.validation_windows = self._held_out.total

    @property
    def draws(self) -> Draws:
        """Where samples come from."""
        return self._draws

    def train(self, count: NDArray[np.integer], *, sequence_length: int | None = None) -> Examples:
        """What a run reads, counted from 0 [K], of any epoch; with a shorter length T / length rows of each."""
        samples = self._draws.numbered(count)
        at, own = self._draws.located(samples)
        rows = {int(index): np.flatnonzero(at == index) for index in np.unique(at)}
        parts = [(here, self._read(index, own[here], samples[here])) for index, here in rows.items()]
        read = parts[0][1] if len(parts) == 1 else _joined(parts)
        return self._objective(read, samples, seed=self._seed, length=sequence_length)

    def validation(self, indices: NDArray[np.integer]) -> Examples:
        """Those of the validation windows [K] in range(validation_windows), spread over all sources; the same for every seed."""
        samples = np.asarray(indices, dtype=np.int64)
        at = self._held_out_at(samples)
        pairs = masked.pairs(samples, at, count=self._held_out.total, seed=None) if self._objective.draws_pairs else None
        following = self._held_out.read(pairs.following) if pairs else None
        return self._objective(Read(text=self._held_out.read(at), following=following, pairs=pairs), samples, seed=None)

    def validation_text(self, indices: NDArray[np.integer]) -> Text:
        """Validation windows [K] as they stand in the corpus."""
        return self._held_out.read(self._held_out_at(np.asarray(indices)))

    def validation_unigram_entropy(self, indices: NDArray[np.integer]) -> float:
        """Nats a token: the loss on these windows' text of a model that knows its token frequencies and nothing else."""
        text, new = self.validation_text(indices), slice(-self._objective.shape.stride, None)
        tokens = text.tokens[:, new] if text.documents is None else text.tokens[:, new][text.documents[:, new] >= 0]
        return entropy(np.bincount(tokens.ravel(), minlength=self.tokenizer_vocabulary))

    def _held_out_at(self, indices: NDArray[np.integer]) -> Numbers:
        if indices.size and (indices.min() < 0 or indices.max() >= self.validation_windows):
            raise IndexError(f"validation windows {indices.min()} to {indices.max()}: there are {self.validation_windows}")
        return self._spread(indices).astype(np.int64)

    def _read(self, index: int, own: Numbers, samples: Numbers) -> Read:
        """The text of those samples that are drawn from one and the same."""
        draw = self._draws.all[index]
        self._draws.read_ahead(index, int(own[0]))
        at = draw.order(own)[1].astype(np.int64)
        text = draw.windows.read(at)
        if not self._objective.draws_pairs:
            return Read(text=text)
        # B is from anywhere, or where shards are read by blocks, from the same shard: any other may not be at hand.
        first, count = (0, draw.windows.total) if isinstance(draw.order, Order) else draw.windows.part(at)
        pairs = masked.pairs(samples, at - first, count=count, seed=self._seed)
        return Read(text=text, following=draw.windows.read(first + pairs.following), pairs=pairs)

    def _windows(self, opened: Opened, *, filler: int) -> tuple[Draws, Cut | Packed]:
        """Those of training, each source by itself where they are mixed and all as one where not; and those of validation."""
        data, shape = self._data, self._objective.shape
        streams = [Stream(home, corpus.train.shards) for home, corpus in opened]
        held_out = [Stream(home, corpus.validation.shards) for home, corpus in opened]
        packed = [packings(home, corpus, shape) for home, corpus in opened] if data.packing == "best_fit" else []

        def windows(streams: Sequence[Stream], bins: Sequence[tuple[Packing, ...]], *, apart: bool) -> Cut | Packed:
            if data.packing == "cut":
                return Cut(streams, shape, apart=apart)
            return Packed(streams, [packing for shards in bins for packing in shards], shape, filler=filler)

        apart, train_bins = data.shuffle_shards is not None, [found.train for found in packed]
        singly = [windows([stream], train_bins[at : at + 1], apart=apart) for at, stream in enumerate(streams)]
        validation = windows(held_out, [found.validation for found in packed], apart=False)
        _check_enough(data, opened, [one.total for one in singly], validation.total, shape)
        names = [source.called for source in data.sources]
        if data.mixture:
            drawn = [Draw.of(name, [stream], one, data, self._seed) for name, stream, one in zip(names, streams, singly, strict=True)]
        else:
            drawn = [Draw.of(", ".join(names), streams, windows(streams, train_bins, apart=apart), data, self._seed)]
        return Draws(drawn, data), validation


def _joined(parts: Sequence[tuple[NDArray[np.intp], Read]]) -> Read:
    """Of several sources, in the order of their rows."""
    back = np.argsort(np.concatenate([rows for rows, _ in parts]))
    following = [read.following for _, read in parts if read.following]
    pairs = [read.pairs for _, read in parts if read.pairs]
    return Read(
        text=Text.joined([read.text for _, read in parts], back),
        following=Text.joined(following, back) if following else None,
        pairs=masked.Pairs.joined(pairs, back) if pairs else None,
    )


def entropy(counts: NDArray[np.integer]) -> float:
    """Of the distribution that these counts [V] are, in nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _check_enough(data: DataConfig, opened: Opened, counts: Sequence[int], held_out: int, shape: Shape) -> None:
    wants = f"a sample of {data.sequence_length} wants {shape.width}"
    manifests = [corpus for _, corpus in opened]
    for corpus, count in zip(manifests, counts, strict=True):
        if not count:
            has = f"{corpus.source!r} has {corpus.train.tokens} train tokens"
            raise InputError(f"data.sequence_length: {has}; {wants}: give more text or lower data.sequence_length")
    if held_out:
        return
    held = max(corpus.validation.tokens for corpus in manifests)
    tokens = max(corpus.train.tokens + corpus.validation.tokens for corpus in manifests)
    documents = max(corpus.train.documents + corpus.validation.documents for corpus in manifests)
    # Documents fall to either side by chance: aim at twice the tokens that are needed, at three documents, and above what did not do.
    share = math.ceil(100 * max(2 * shape.width / tokens, 3 / documents, 2 * data.validation)) / 100
    remedy = f"raise data.validation from {data.validation:g} to {share:g}" if share < 0.5 else "give more documents"
    raise InputError(f"data.validation: {held} tokens are held out; {wants}: {remedy}")


def _check_cache(data: DataConfig, opened: Opened) -> None:
    """A corpus that is read all over has to fit into the cache; one that is read by blocks, two of them."""
    sizes = [size for home, corpus in opened for shard in corpus.train.shards if (size := home.remote_bytes(shard))]
    held_out = sum(home.remote_bytes(shard) for home, corpus in opened for shard in corpus.validation.shards)
    if data.shuffle_shards is None:
        needed, remedy = sum(sizes), "raise it, or set data.shuffle_shards, to shuffle through so many shards at a time"
    else:
        blocks = 2 * data.shuffle_shards * (len(opened) if data.mixture else 1)
        needed, remedy = sum(sorted(sizes, reverse=True)[:blocks]), "raise it, or lower data.shuffle_shards"
    if sizes and needed + held_out > data.cache.bytes:
        wants = f"at least {needed + held_out:,} for the shards that are read at a time"
        raise InputError(f"data.cache.bytes: got {data.cache.bytes:,}, wants {wants}; {remedy}")
