"""What a prepared corpus is made of: how long its documents are, and what windows make of them. Of its text nothing is read.

Legend: D documents, S streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from manta.data.sampling.packed_windows import find_packing
from manta.data.sampling.packing import best_fit
from manta.data.sampling.sampler import SourceSampler
from manta.data.sampling.windows import WindowShape
from manta.data.shards.corpus_directory import Home
from manta.data.shards.manifest import Manifest
from manta.data.shards.shard import Shard

Numbers = NDArray[np.int64]

PER_OCTAVE = 4  # bins of a histogram from one power of two to the next
EDGES = np.unique(np.rint(2 ** (np.arange(32 * PER_OCTAVE + 1) / PER_OCTAVE))).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lengths:
    """A histogram of documents by their length in tokens: bin b counts those of edges[b] <= length < edges[b + 1]."""

    edges: Numbers
    documents: Numbers
    tokens: Numbers

    @classmethod
    def of(cls, lengths: NDArray[np.integer]) -> Self:
        bins = np.searchsorted(EDGES, lengths, side="right") - 1
        count = len(EDGES) - 1
        tokens = np.bincount(bins, weights=lengths, minlength=count)
        return cls(edges=EDGES, documents=np.bincount(bins, minlength=count), tokens=np.rint(tokens).astype(np.int64))

    def __add__(self, other: Self) -> Self:
        return type(self)(edges=EDGES, documents=self.documents + other.documents, tokens=self.tokens + other.tokens)

    def by_octave(self) -> Self:
        """The same in bins from one power of two to the next, and of these only those between the shortest and the longest."""
        octaves = 2 ** np.arange(33, dtype=np.int64)
        firsts = np.searchsorted(EDGES, octaves[:-1])
        documents, tokens = np.add.reduceat(self.documents, firsts), np.add.reduceat(self.tokens, firsts)
        some = np.flatnonzero(documents)
        first, end = (int(some[0]), int(some[-1]) + 1) if len(some) else (0, 0)
        return type(self)(edges=octaves[first : end + 1], documents=documents[first:end], tokens=tokens[first:end])


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """What becomes of documents in samples, once all are read."""

    samples: int
    cut: int
    """Documents that lie in more than one sample."""
    padding: int
    """Places of samples that hold nothing."""
    places: int

    def __add__(self, other: Self) -> Self:
        names = ("samples", "cut", "padding", "places")
        return type(self)(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Of one source, its documents to train on."""

    lengths: Lengths
    cut: Packing
    best_fit: Packing


def contents(home: Home, corpus: Manifest, shape: WindowShape, *, apart: bool) -> Contents:
    """Reads the indexes, shard by shard, and packs what is not packed yet. apart: whether windows end with their shard."""
    lengths, counts = Lengths.of(np.zeros(0, dtype=np.int64)), np.zeros(2, dtype=np.int64)
    packed = find_packing(home, corpus, shape)
    bins = 0 if packed is None else sum(packing.bins for packing in packed.train)
    cut = windows = filled = begin = 0
    for shard in corpus.train.shards:
        lengths_D = document_lengths(home, shard)
        lengths += Lengths.of(lengths_D)
        cut += documents_cut(lengths_D, shape, begin=0 if apart else begin)
        begin += shard.tokens
        windows += windows_in(shard.tokens, shape) if apart else 0
        bins += 0 if packed else len(best_fit(lengths_D, shape.width, overlap=shape.width - shape.stride))
        pieces_D = pieces(lengths_D, shape)
        counts += len(lengths_D), int((pieces_D > 1).sum())
        filled += int(lengths_D.sum() + (pieces_D - 1).sum() * (shape.width - shape.stride))
    windows = windows if apart else windows_in(begin, shape)
    return Contents(
        lengths=lengths,
        cut=Packing(samples=windows, cut=cut, padding=0, places=windows * shape.width),
        best_fit=Packing(samples=bins, cut=int(counts[1]), padding=bins * shape.width - filled, places=bins * shape.width),
    )


def document_lengths(home: Home, shard: Shard) -> Numbers:
    """In tokens [D]."""
    return home.index(shard).document_lengths()


def windows_in(tokens: int, shape: WindowShape) -> int:
    """Of running text of so many tokens."""
    return max(0, tokens - shape.width + shape.stride) // shape.stride


def documents_cut(lengths_D: Numbers, shape: WindowShape, *, begin: int) -> int:
    """How many of these documents, which stand end to end from token `begin` on, windows of running text cut."""
    ends_D = begin + np.cumsum(lengths_D)
    return int(((ends_D - lengths_D) // shape.stride != (ends_D - 1) // shape.stride).sum())


def pieces(lengths_D: Numbers, shape: WindowShape) -> Numbers:
    """Into how many pieces best-fit packing cuts each document [D]; most are one."""
    shared = shape.width - shape.stride
    return np.maximum(1, -(-(lengths_D - shared) // shape.stride))


def windows_by_stream(draw: SourceSampler) -> Numbers:
    """How many of a draw's windows are of each of its streams [S]."""
    return np.bincount(_owners(draw), weights=draw.dataset.counts, minlength=len(draw.streams)).astype(np.int64)


def stream_of(draw: SourceSampler, window: int) -> int:
    """Which of a draw's streams a window is of."""
    return int(_owners(draw)[np.searchsorted(np.cumsum(draw.dataset.counts), window, side="right")])


def _owners(draw: SourceSampler) -> Numbers:
    """Windows are counted by stream, or where they end with their shard, by shard: which stream each count is of."""
    shards: Sequence[int] = [len(stream.shards) for stream in draw.streams]
    by_stream = len(draw.dataset.counts) == len(shards)
    return np.arange(len(shards)) if by_stream else np.repeat(np.arange(len(shards)), shards)
