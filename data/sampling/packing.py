"""Whole documents packed into samples: best-fit decreasing, by a histogram of lengths (Ding et al., "Fewer Truncations Improve Language
Modeling", ICML 2024, section 2.2), so that a shard of 100,000 documents takes milliseconds.

A bin holds W tokens. A document longer than that is cut into pieces of W, which share one token with the next where each token is
predicted from those before it; its rest is packed like any other. Nothing else is ever cut. Each shard is packed by itself, and its
bins stand in a keyed order.

The packing is part of every run's identity. It may never change under one `VERSION`; golden vectors in the tests hold it.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manta.data.sampling.order import Permutation

VERSION = 1

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bins:
    """The pieces of bin b are starts[edges[b] : edges[b + 1]], first tokens in the shard, and lengths likewise."""

    edges: Numbers  # [bins + 1]
    starts: Numbers  # [pieces]
    lengths: NDArray[np.integer]  # [pieces]

    def __len__(self) -> int:
        return len(self.edges) - 1


@dataclass(frozen=True, slots=True)
class _Filling:
    """What a bin holds: `copies` pieces of a length beside what it held before."""

    length: int
    copies: int
    before: "_Filling | None"


def best_fit(documents: NDArray[np.integer], width: int, *, shared: int = 1) -> Bins:
    """Lengths [D] in tokens of a shard's documents, end to end -> its bins of at most `width` tokens, every token in one.

    shared: tokens that the pieces of a long document have in common, 0 or 1, less than width.
    """
    starts, lengths = _pieces(np.asarray(documents, dtype=np.int64), width, shared)
    by_length = np.argsort(lengths, kind="stable")
    counts = np.bincount(lengths, minlength=width + 1)
    given = np.cumsum(counts) - counts  # of each length, where in by_length the next one not yet placed stands
    held: list[Numbers] = []  # of bins that are filled alike: their pieces, [bins, pieces of each]
    for filling, bins in _fill(counts, width):
        parts: list[Numbers] = []
        link: _Filling | None = filling
        while link is not None:
            first, taken = given[link.length], bins * link.copies
            parts.append(by_length[first : first + taken].reshape(bins, link.copies))
            given[link.length] += taken
            link = link.before
        held.append(np.concatenate(parts[::-1], axis=1))
    sizes = np.concatenate([np.full(len(alike), alike.shape[1]) for alike in held]) if held else np.zeros(0, np.int64)
    pieces = np.concatenate([alike.ravel() for alike in held]) if held else np.zeros(0, np.int64)
    return _shuffled(sizes, starts[pieces], lengths[pieces])


def _pieces(documents: Numbers, width: int, shared: int) -> tuple[Numbers, Numbers]:
    """First token and length of each piece, in order; most documents are one."""
    counts = np.maximum(1, -(-(documents - shared) // (width - shared)))
    owners = np.repeat(np.arange(len(documents)), counts)
    turns = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = turns * (width - shared)
    starts = (np.cumsum(documents) - documents)[owners] + begins
    return starts, np.minimum(width, documents[owners] - begins)


def _fill(counts: Numbers, width: int) -> list[tuple[_Filling, int]]:
    """Bins that are filled alike, and how many: longest pieces first, each into the bin that it leaves the least room in."""
    groups: defaultdict[int, list[tuple[_Filling | None, int]]] = defaultdict(list)  # by the room that is left
    rooms: list[int] = []  # those there are, rising
    full: list[tuple[_Filling, int]] = []

    def put(room: int, filling: _Filling, bins: int) -> None:
        if room == 0:
            full.append((filling, bins))
            return
        if not groups[room]:
            insort(rooms, room)
        groups[room].append((filling, bins))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                room, filling, bins = width, None, left
            else:
                room = rooms[at]
                filling, bins = groups[room].pop()
                if not groups[room]:
                    del rooms[at]
            each = min(room // length, left)  # once begun, a bin is the tightest until it takes no more
            used = min(bins, left // each)
            put(room - each * length, _Filling(length, each, filling), used)
            if filling is not None and used < bins:
                put(room, filling, bins - used)
            left -= used * each
    return [*full, *((filling, bins) for room in rooms for filling, bins in groups[room] if filling is not None)]


def _shuffled(sizes: Numbers, starts: Numbers, lengths: Numbers) -> Bins:
    """Else bins would stand by the length of what they hold."""
    if not len(sizes):
        return Bins(edges=np.zeros(1, np.int64), starts=starts, lengths=lengths)
    order = Permutation(len(sizes), key=0)(np.arange(len(sizes))).astype(np.int64)
    before = np.cumsum(sizes) - sizes
    edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[order])])
    pieces = np.repeat(before[order] - edges[:-1], sizes[order]) + np.arange(edges[-1])
    return Bins(edges=edges, starts=starts[pieces], lengths=lengths[pieces])
