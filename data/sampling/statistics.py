"""Statistics of a prepared corpus: the lengths of its documents, and what windows and packing do to them. Only indexes are read.

Legend: D documents, S streams.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from manta.data.sampling.packed_windows import find_packing
from manta.data.sampling.packing import best_fit
from manta.data.sampling.samples import SourceSampler
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.manifest import Manifest
from manta.data.shards.windows import WindowShape

Counts = NDArray[np.int64]

PER_OCTAVE = 4  # bins of a histogram from one power of two to the next
EDGES = np.unique(np.rint(2 ** (np.arange(32 * PER_OCTAVE + 1) / PER_OCTAVE))).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LengthHistogram:
    """Documents by their length in tokens: bin b counts those with edges[b] <= length < edges[b + 1]."""

    edges: Counts
    documents: Counts
    tokens: Counts

    @classmethod
    def of(cls, lengths: NDArray[np.integer]) -> Self:
        bins = np.searchsorted(EDGES, lengths, side="right") - 1
        count = len(EDGES) - 1
        tokens = np.bincount(bins, weights=lengths, minlength=count)
        return cls(edges=EDGES, documents=np.bincount(bins, minlength=count), tokens=np.rint(tokens).astype(np.int64))

    def __add__(self, other: Self) -> Self:
        return type(self)(edges=EDGES, documents=self.documents + other.documents, tokens=self.tokens + other.tokens)

    def by_octave(self) -> Self:
        """Return it in bins from one power of two to the next, from the shortest document's to the longest's."""
        octaves = 2 ** np.arange(33, dtype=np.int64)
        firsts = np.searchsorted(EDGES, octaves[:-1])
        documents, tokens = np.add.reduceat(self.documents, firsts), np.add.reduceat(self.tokens, firsts)
        used = np.flatnonzero(documents)
        first, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        return type(self)(edges=octaves[first : end + 1], documents=documents[first:end], tokens=tokens[first:end])


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingStatistics:
    """What one epoch of samples does to documents."""

    samples: int
    cut: int
    """Documents in more than one sample."""
    padding: int
    """Positions of samples without a token."""
    places: int
    """All positions of samples."""

    def __add__(self, other: Self) -> Self:
        return type(self)(**{key: value + getattr(other, key) for key, value in asdict(self).items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusStatistics:
    """Of the training documents of one source."""

    lengths: LengthHistogram
    cut: PackingStatistics
    best_fit: PackingStatistics

    def __add__(self, other: Self) -> Self:
        return type(self)(lengths=self.lengths + other.lengths, cut=self.cut + other.cut, best_fit=self.best_fit + other.best_fit)


def corpus_statistics(directory: CorpusDirectory, corpus: Manifest, shape: WindowShape, *, apart: bool) -> CorpusStatistics:
    """Read the indexes shard by shard, and pack shards that are not packed yet. apart: windows do not continue from shard to shard."""
    lengths = LengthHistogram.of(np.zeros(0, dtype=np.int64))
    packed = find_packing(directory, corpus, shape)
    bins = 0 if packed is None else sum(packing.bins for packing in packed.train)
    overlap = shape.width - shape.stride
    cut = windows = split = filled = position = 0
    for shard in corpus.train.shards:
        lengths_D = directory.read_index(shard).document_lengths()
        lengths += LengthHistogram.of(lengths_D)
        cut += documents_cut(lengths_D, shape, start=0 if apart else position)
        position += shard.tokens
        windows += shape.count(shard.tokens) if apart else 0
        bins += 0 if packed else len(best_fit(lengths_D, shape.width, overlap=overlap))
        pieces_D = np.maximum(1, -(-(lengths_D - overlap) // shape.stride))  # of each document, once packed
        split += int((pieces_D > 1).sum())
        filled += int(lengths_D.sum() + (pieces_D - 1).sum() * overlap)
    windows = windows if apart else shape.count(position)
    return CorpusStatistics(
        lengths=lengths,
        cut=PackingStatistics(samples=windows, cut=cut, padding=0, places=windows * shape.width),
        best_fit=PackingStatistics(samples=bins, cut=split, padding=bins * shape.width - filled, places=bins * shape.width),
    )


def documents_cut(lengths_D: Counts, shape: WindowShape, *, start: int) -> int:
    """Return how many documents, which are stored end to end from token `start` on, windows of continuous text cut."""
    ends_D = start + np.cumsum(lengths_D)
    return int(((ends_D - lengths_D) // shape.stride != (ends_D - 1) // shape.stride).sum())


def windows_by_stream(sampler: SourceSampler) -> Counts:
    """Return the windows of each of a sampler's streams [S]."""
    return np.bincount(_streams(sampler), weights=sampler.dataset.counts, minlength=len(sampler.streams)).astype(np.int64)


def stream_of(sampler: SourceSampler, window: int) -> int:
    """Return the index of the stream that a sampler's window is from."""
    return int(_streams(sampler)[np.searchsorted(np.cumsum(sampler.dataset.counts), window, side="right")])


def _streams(sampler: SourceSampler) -> Counts:
    """Return the stream of each of the sampler's counts, which are by stream, or by shard if windows end with their shard."""
    shards: Sequence[int] = [len(stream.shards) for stream in sampler.streams]
    by_stream = len(sampler.dataset.counts) == len(shards)
    return np.arange(len(shards)) if by_stream else np.repeat(np.arange(len(shards)), shards)
