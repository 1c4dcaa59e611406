"""The order in which a corpus is read: a keyed permutation, computed and never stored.

`Permutation(n, key)` maps position k of an epoch to the window read there. It takes no memory that grows with n, any
position costs the same, and any rank can ask for any position: that is what makes a run resume at once, on any number of
machines. Mixed-radix Feistel network with cycle walking, after Black and Rogaway, "Ciphers with Arbitrary Finite Domains"
(CT-RSA 2002), method 3 and section 4. `Order` strings epochs together, each under a key of its own;
`BlockOrder` does the same for a corpus too large to be read all over at once.

The order is part of every run's identity. It may never change under one `VERSION`; golden vectors in the tests hold it.
"""

from functools import lru_cache
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from manta.data.hashing import GOLDEN, hashed, mix

VERSION = 1
ROUNDS = 6  # three fail a serial test by 1,000 sigma; four pass; six leave a margin

_SHARDS, _WITHIN = range(2)  # what a block order draws: each has hashes of its own

Indices = NDArray[np.uint64]


class Permutation:
    """A pseudo-random bijection of range(n), fixed by its key."""

    def __init__(self, n: int, key: int) -> None:
        """n: number of samples, 1 <= n < 2**62. key: any integer; its low 64 bits count.

        Raises ValueError where n is out of range.
        """
        if not 1 <= n < 2**62:
            raise ValueError(f"a permutation of {n} samples: wants between 1 and 2**62 - 1")
        side = isqrt(n - 1) + 1
        self.n = n
        self._left, self._right = np.uint64(side), np.uint64(-(-n // side))  # left * right >= n, by less than one row
        rounds = np.arange(1, ROUNDS + 1, dtype=np.uint64)
        self._keys = mix(rounds * GOLDEN + np.uint64(key & (2**64 - 1)))

    def __call__(self, positions: NDArray[np.integer]) -> Indices:
        """Positions [K] in range(n) -> samples [K]."""
        samples = self._encrypt(np.asarray(positions, dtype=np.uint64))
        while (outside := np.flatnonzero(samples >= self.n)).size:
            samples[outside] = self._encrypt(samples[outside])
        return samples

    def _encrypt(self, x: Indices) -> Indices:
        left, right = x // self._right, x % self._right
        for turn, key in enumerate(self._keys):
            if turn % 2:
                left = (left + mix(right + key) % self._left) % self._left
            else:
                right = (right + mix(left + key) % self._right) % self._right
        return left * self._right + right


class Order:
    """Which of n windows sample number g reads, for any g: every window once an epoch, each epoch in another order."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.seed = seed

    def __call__(self, numbers: NDArray[np.integer]) -> tuple[Indices, Indices]:
        """Sample numbers [K] -> (epochs [K], windows [K] in range(n)). A batch may straddle epochs."""
        epochs, positions = np.divmod(np.asarray(numbers, dtype=np.uint64), np.uint64(self.n))
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = Permutation(self.n, int(hashed(self.seed, epoch)[0]))(positions[here])
        return epochs, windows


class BlockOrder:
    """The order of a corpus that no node can hold: shards in a keyed order, so many at a time, and all windows of those shuffled through.

    Every window once an epoch, as in `Order`; a node that reads on needs the shards of one block, and soon of the next.
    """

    def __init__(self, counts: NDArray[np.integer], seed: int, *, at_a_time: int) -> None:
        """Counts [S]: windows of each shard, some of them above 0."""
        self.n = int(np.sum(counts))
        self.seed = seed
        self._at_a_time = at_a_time
        self._counts = np.asarray(counts, dtype=np.int64)
        self._firsts = np.cumsum(self._counts) - self._counts
        self._laid_out = lru_cache(2)(self._lay_out)  # a batch may straddle epochs

    def __call__(self, numbers: NDArray[np.integer]) -> tuple[Indices, Indices]:
        """As `Order`'s."""
        epochs, positions = np.divmod(np.asarray(numbers, dtype=np.uint64), np.uint64(self.n))
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            shards, ends, block_ends = self._laid_out(epoch)
            here = np.flatnonzero(epochs == epoch)
            blocks = np.searchsorted(block_ends, positions[here].astype(np.int64), side="right")
            for block in np.unique(blocks).tolist():
                begin = int(block_ends[block - 1]) if block else 0
                within = Permutation(int(block_ends[block]) - begin, int(hashed(self.seed, epoch, _WITHIN, block)[0]))
                rows = here[blocks == block]
                places = begin + within(positions[rows] - np.uint64(begin)).astype(np.int64)
                slots = np.searchsorted(ends, places, side="right")
                windows[rows] = self._firsts[shards[slots]] + places - (ends[slots] - self._counts[shards[slots]])
        return epochs, windows

    def block(self, number: int) -> tuple[int, int]:
        """Epoch and block that sample `number` is of."""
        epoch, position = divmod(number, self.n)
        return epoch, int(np.searchsorted(self._laid_out(epoch)[2], position, side="right"))

    def ahead(self, number: int) -> list[int]:
        """The shards that sample `number` and those after it want: of its block, then of the next one."""
        epoch, block = self.block(number)
        shards = self._laid_out(epoch)[0]
        wanted = shards[block * self._at_a_time : (block + 2) * self._at_a_time].tolist()
        if (block + 1) * self._at_a_time >= len(shards):
            wanted += self._laid_out(epoch + 1)[0][: self._at_a_time].tolist()
        return list(dict.fromkeys(wanted))

    def _lay_out(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of an epoch: its shards in order, where each one's windows end, and where each block's do."""
        some = np.flatnonzero(self._counts)
        key = int(hashed(self.seed, epoch, _SHARDS)[0])
        shards = some[Permutation(len(some), key)(np.arange(len(some))).astype(np.int64)]
        ends = np.cumsum(self._counts[shards])
        lasts = np.minimum(np.arange(self._at_a_time, len(some) + self._at_a_time, self._at_a_time), len(some)) - 1
        return shards, ends, ends[lasts]
