"""Counter-based random numbers: each is a hash of a seed and counters, so any of them can be computed alone, in any order.

splitmix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), with one round per counter.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: multiples of it spread evenly

Hashes = NDArray[np.uint64]


def hashed(seed: int, *counters: ArrayLike) -> Hashes:
    """Return the hash of the seed (its low 64 bits) and of the counters, which broadcast; at least one dimension."""
    state = mix(np.array([seed & (2**64 - 1)], dtype=np.uint64) + GOLDEN)
    for counter in counters:
        state = fold(state, counter)
    return state


def fold(state: Hashes, counter: ArrayLike) -> Hashes:
    """Add a counter to a hash. Mixing keeps counter c + 1 of one state apart from counter c of the next."""
    return mix(state + np.atleast_1d(np.asarray(counter, dtype=np.uint64)) * GOLDEN)


def mix(x: Hashes) -> Hashes:
    """splitmix64's finalizer: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
