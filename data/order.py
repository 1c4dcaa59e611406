"""The order in which a corpus is read: a keyed permutation, computed and never stored.

`Permutation(n, key)` maps position k of an epoch to the window read there. It takes no memory that grows with n, any
position costs the same, and any rank can ask for any position: that is what makes a run resume at once, on any number of
machines. Mixed-radix Feistel network with cycle walking, after Black and Rogaway, "Ciphers with Arbitrary Finite Domains"
(CT-RSA 2002), method 3 and section 4. `Order` strings epochs together, each under a key of its own.

The order is part of every run's identity. It may never change under one `VERSION`; golden vectors in the tests hold it.
"""

from math import isqrt

import numpy as np
from numpy.typing import NDArray

from manta.data.hashing import GOLDEN, hashed, mix

VERSION = 1
ROUNDS = 6  # three fail a serial test by 1,000 sigma; four pass; six leave a margin

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
