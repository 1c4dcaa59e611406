"""Whole documents packed into bins: best-fit decreasing on a histogram of lengths (Ding et al., "Fewer Truncations Improve Language
Modeling", ICML 2024, section 2.2), so that a shard of 100,000 documents takes milliseconds.

A bin holds up to W tokens. A longer document is cut into pieces of W tokens; each piece repeats the last token of the previous one if
tokens are predicted from those before them. The remainder is packed like any document, and nothing else is cut. Each shard is packed
on its own, and its bins are in a pseudo-random order.

The packing is part of a run's identity. It must never change within one `VERSION`; golden vectors in the tests check it.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from manta.data.sampling.order import Permutation

VERSION = 1

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bins:
    """Pieces of documents by bin: bin b has pieces edges[b] to edges[b + 1]."""

    edges: Numbers  # [bins + 1]
    starts: Numbers  # [pieces]: first token in the shard
    lengths: NDArray[np.integer]  # [pieces]

    def __len__(self) -> int:
        return len(self.edges) - 1


class _BinContents(NamedTuple):
    """A linked list of what a bin holds: `copies` pieces of one length, added to the contents `previous`."""

    length: int
    copies: int
    previous: "_BinContents | None"


def best_fit(documents: NDArray[np.integer], width: int, *, overlap: int = 1) -> Bins:
    """Pack a shard's documents, given their lengths [D] in tokens, into bins of at most `width` tokens.

    overlap: tokens, 0 or 1, that consecutive pieces of a long document share; less than width.
    """
    starts, lengths = _cut_long_documents(np.asarray(documents, dtype=np.int64), width, overlap)
    by_length = np.argsort(lengths, kind="stable")
    counts = np.bincount(lengths, minlength=width + 1)
    next_piece = np.cumsum(counts) - counts  # for each length, the index in by_length of its first unassigned piece
    groups: list[Numbers] = []  # [bins, pieces per bin] of bins with the same contents
    for contents, bins in _fill(counts, width):
        columns: list[Numbers] = []
        link: _BinContents | None = contents
        while link is not None:
            first, count = next_piece[link.length], bins * link.copies
            columns.append(by_length[first : first + count].reshape(bins, link.copies))
            next_piece[link.length] += count
            link = link.previous
        groups.append(np.concatenate(columns[::-1], axis=1))
    if not groups:
        return Bins(edges=np.zeros(1, np.int64), starts=starts, lengths=lengths)
    sizes = np.concatenate([np.full(len(group), group.shape[1]) for group in groups])
    pieces = np.concatenate([group.ravel() for group in groups])
    return _shuffle(sizes, starts[pieces], lengths[pieces])


def _cut_long_documents(documents: Numbers, width: int, overlap: int) -> tuple[Numbers, Numbers]:
    """Return the first token and the length of each piece, in order. Most documents are a single piece."""
    counts = np.maximum(1, -(-(documents - overlap) // (width - overlap)))
    owners = np.repeat(np.arange(len(documents)), counts)
    numbers = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets = numbers * (width - overlap)
    starts = (np.cumsum(documents) - documents)[owners] + offsets
    return starts, np.minimum(width, documents[owners] - offsets)


def _fill(counts: Numbers, width: int) -> list[tuple[_BinContents, int]]:
    """Return (contents, number of bins): longest pieces first, each into the bin with the least space that fits it."""
    groups: defaultdict[int, list[tuple[_BinContents | None, int]]] = defaultdict(list)  # by remaining space
    spaces: list[int] = []  # the keys of nonempty groups, ascending
    full: list[tuple[_BinContents, int]] = []

    def put(space: int, contents: _BinContents, bins: int) -> None:
        if space == 0:
            full.append((contents, bins))
            return
        if not groups[space]:
            insort(spaces, space)
        groups[space].append((contents, bins))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            index = bisect_left(spaces, length)
            if index == len(spaces):
                space, contents, bins = width, None, left
            else:
                space = spaces[index]
                contents, bins = groups[space].pop()
                if not groups[space]:
                    del spaces[index]
            copies = min(space // length, left)  # a bin that gets one piece stays the best fit until it is full for this length
            used = min(bins, left // copies)
            put(space - copies * length, _BinContents(length, copies, contents), used)
            if contents is not None and used < bins:
                put(space, contents, bins - used)
            left -= used * copies
    return [*full, *((contents, bins) for space in spaces for contents, bins in groups[space] if contents is not None)]


def _shuffle(sizes: Numbers, starts: Numbers, lengths: Numbers) -> Bins:
    """Permute the bins, which are sorted by the lengths of their pieces. sizes: pieces per bin."""
    order = Permutation(len(sizes), key=0)(np.arange(len(sizes))).astype(np.int64)
    before = np.cumsum(sizes) - sizes
    edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[order])])
    pieces = np.repeat(before[order] - edges[:-1], sizes[order]) + np.arange(edges[-1])
    return Bins(edges=edges, starts=starts[pieces], lengths=lengths[pieces])
