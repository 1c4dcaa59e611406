"""The order in which a corpus is read: a keyed permutation, computed and never stored.

`Permutation(n, key)` maps position k of an epoch to a window. It needs constant memory, every position costs the same, and any
rank can compute any position. That is why a run resumes at once on any number of machines. It is a mixed-radix Feistel network
with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, method 3 and section 4).
`Order` chains epochs, each with its own key. `BlockOrder` does the same for a corpus that is larger than the cache.

The order is part of a run's identity. It must never change within one `VERSION`; golden vectors in the tests check it.
"""

from functools import lru_cache
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from manta.data.hashing import GOLDEN, hashed, mix

VERSION = 1
ROUNDS = 6  # three fail a serial test by 1,000 sigma; four pass; six leave a margin

_SHARDS, _WITHIN = range(2)  # hash domains of a block order

Indices = NDArray[np.uint64]


class Permutation:
    """A pseudo-random bijection of range(n), fixed by its key."""

    def __init__(self, n: int, key: int) -> None:
        """n: number of samples, 1 <= n < 2**62. key: any integer; its low 64 bits count.

        Raises ValueError if n is out of range.
        """
        if not 1 <= n < 2**62:
            raise ValueError(f"n: expected between 1 and 2**62 - 1 samples, got {n}")
        side = isqrt(n - 1) + 1
        self.n = n
        self._left, self._right = np.uint64(side), np.uint64(-(-n // side))  # left * right >= n, by less than one row
        rounds = np.arange(1, ROUNDS + 1, dtype=np.uint64)
        self._keys = mix(rounds * GOLDEN + np.uint64(key & (2**64 - 1)))

    def __call__(self, positions: NDArray[np.integer]) -> Indices:
        """Map positions [K] in range(n) to samples [K]."""
        samples = self._encrypt(np.asarray(positions, dtype=np.uint64))
        while (outside := np.flatnonzero(samples >= self.n)).size:
            samples[outside] = self._encrypt(samples[outside])
        return samples

    def _encrypt(self, x: Indices) -> Indices:
        left, right = x // self._right, x % self._right
        for number, key in enumerate(self._keys):
            if number % 2:
                left = (left + mix(right + key) % self._left) % self._left
            else:
                right = (right + mix(left + key) % self._right) % self._right
        return left * self._right + right


class Order:
    """The window of each sample number: every window once per epoch, each epoch in a different order."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.seed = seed

    def __call__(self, numbers: NDArray[np.integer]) -> tuple[Indices, Indices]:
        """Map sample numbers [K] to (epochs [K], windows [K] in range(n)). A batch may span epochs."""
        epochs, positions = np.divmod(np.asarray(numbers, dtype=np.uint64), np.uint64(self.n))
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            windows[rows] = Permutation(self.n, int(hashed(self.seed, epoch)[0]))(positions[rows])
        return epochs, windows


class BlockOrder:
    """The order of a corpus that is larger than a node's cache.

    Shards are permuted and grouped into blocks, and the windows of a block are permuted. Every window is read once per epoch, as in
    `Order`, but a node needs only the shards of one block at a time, and the next block's soon after.
    """

    def __init__(self, counts: NDArray[np.integer], seed: int, *, shards_per_block: int) -> None:
        """Counts [S]: windows of each shard, at least one of them above 0."""
        self.n = int(np.sum(counts))
        self.seed = seed
        self._shards_per_block = shards_per_block
        self._counts = np.asarray(counts, dtype=np.int64)
        self._firsts = np.cumsum(self._counts) - self._counts
        self._epoch = lru_cache(2)(self._compute_epoch)  # a batch may span two epochs

    def __call__(self, numbers: NDArray[np.integer]) -> tuple[Indices, Indices]:
        """Map sample numbers [K] to (epochs [K], windows [K] in range(n))."""
        epochs, positions = np.divmod(np.asarray(numbers, dtype=np.uint64), np.uint64(self.n))
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            shards, shard_ends, block_ends = self._epoch(epoch)
            in_epoch = np.flatnonzero(epochs == epoch)
            blocks = np.searchsorted(block_ends, positions[in_epoch].astype(np.int64), side="right")
            for block in np.unique(blocks).tolist():
                start = int(block_ends[block - 1]) if block else 0
                within = Permutation(int(block_ends[block]) - start, int(hashed(self.seed, epoch, _WITHIN, block)[0]))
                rows = in_epoch[blocks == block]
                permuted = start + within(positions[rows] - np.uint64(start)).astype(np.int64)
                slots = np.searchsorted(shard_ends, permuted, side="right")
                windows[rows] = self._firsts[shards[slots]] + permuted - (shard_ends[slots] - self._counts[shards[slots]])
        return epochs, windows

    def block(self, number: int) -> tuple[int, int]:
        """Return the epoch of a sample and its block in the epoch."""
        epoch, position = divmod(number, self.n)
        return epoch, int(np.searchsorted(self._epoch(epoch)[2], position, side="right"))

    def upcoming_shards(self, number: int) -> list[int]:
        """Return the shards of the sample's block and of the next block, in reading order."""
        epoch, block = self.block(number)
        shards, size = self._epoch(epoch)[0], self._shards_per_block
        upcoming = shards[block * size : (block + 2) * size].tolist()
        if (block + 1) * size >= len(shards):
            upcoming += self._epoch(epoch + 1)[0][:size].tolist()
        return list(dict.fromkeys(upcoming))

    def _compute_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return an epoch's shards in order, the end of each shard's windows, and the end of each block's windows."""
        nonempty = np.flatnonzero(self._counts)
        key = int(hashed(self.seed, epoch, _SHARDS)[0])
        shards = nonempty[Permutation(len(nonempty), key)(np.arange(len(nonempty))).astype(np.int64)]
        ends = np.cumsum(self._counts[shards])
        size = self._shards_per_block
        lasts = np.minimum(np.arange(size, len(nonempty) + size, size), len(nonempty)) - 1
        return shards, ends, ends[lasts]
