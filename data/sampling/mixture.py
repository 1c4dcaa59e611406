"""Which source each sample is from, and which of the source's own samples it is, by weights that change in stages.

A stage repeats a period of 65,536 slots. The number of a source's slots is proportional to its weight, and they are spread evenly: slot k
of c is as close as possible to (k + 1/2) / c of the period. So every batch has close to each source's share, and the number of a source's
samples before sample g takes one multiplication and one lookup. A source's own samples are counted across stages: none is lost in between.

The table is part of a run's identity. It must never change within one `VERSION`; golden vectors in the tests check it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

VERSION = 1
PERIOD = 2**16

Numbers = NDArray[np.int64]


class _MixtureStage(NamedTuple):
    first: int  # first sample number
    before: Numbers  # [S]: samples of each source in previous stages
    counts: Numbers  # [S]: slots of each source in a period
    sources: Numbers  # [PERIOD]: source of each slot
    occurrences: Numbers  # [PERIOD]: how many slots of the same source precede it in the period

    def samples_before(self, number: int) -> Numbers:
        """Return the samples of each source [S] before a sample number that is in this stage or ends it."""
        periods, slots = divmod(number - self.first, PERIOD)
        return self.before + periods * self.counts + np.bincount(self.sources[:slots], minlength=len(self.counts))


class Mixture:
    """S sources by weight."""

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]]) -> None:
        """stages: (first sample number, nonnegative weight of each source). The first starts at 0; each has a positive weight."""
        self._stages: list[_MixtureStage] = []
        for first, weights in stages:
            before = self._stages[-1].samples_before(first) if self._stages else np.zeros(len(weights), dtype=np.int64)
            counts = quotas(weights)
            sources = spread(counts)
            occurrences = np.empty(PERIOD, dtype=np.int64)
            for source, count in enumerate(counts.tolist()):
                occurrences[sources == source] = np.arange(count)
            self._stages.append(_MixtureStage(first, before, counts, sources, occurrences))
        self._firsts = np.array([first for first, _ in stages], dtype=np.int64)

    def __call__(self, numbers: NDArray[np.integer]) -> tuple[Numbers, Numbers]:
        """Map sample numbers [K] to their sources [K] and to the sources' own sample numbers [K]."""
        numbers = np.asarray(numbers, dtype=np.int64)
        sources, own = np.empty_like(numbers), np.empty_like(numbers)
        stages = np.searchsorted(self._firsts, numbers, side="right") - 1
        for index in np.unique(stages):
            stage, rows = self._stages[index], stages == index
            periods, slots = np.divmod(numbers[rows] - stage.first, PERIOD)
            sources[rows] = chosen = stage.sources[slots]
            own[rows] = stage.before[chosen] + periods * stage.counts[chosen] + stage.occurrences[slots]
        return sources, own

    def samples_before(self, number: int) -> Numbers:
        """Return the samples of each source [S] among the first `number`."""
        return self._stages[bisect_right(self._firsts.tolist(), number) - 1].samples_before(number)


def quotas(weights: Sequence[float]) -> Numbers:
    """Return the slots of each source in a period: closest to its weight, and at least one if the weight is positive."""
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights) * PERIOD
    counts = np.where(shares > 0, np.maximum(np.floor(shares), 1), 0).astype(np.int64)
    by_deficit = np.argsort(counts - shares, kind="stable")  # the source furthest below its share first
    while missing := PERIOD - int(counts.sum()):
        if missing > 0:
            counts[by_deficit[:missing]] += 1
        else:
            counts[np.argmax(counts)] -= 1
    return counts


def spread(counts: Numbers) -> Numbers:
    """Return the sources [PERIOD], each `counts` times and evenly spread: slots sorted by their ideal positions, in integers."""
    sources = np.repeat(np.arange(len(counts)), counts)
    occurrences = np.concatenate([np.arange(count) for count in counts.tolist()])
    ideal = ((2 * occurrences + 1) << 44) // counts[sources]
    return sources[np.lexsort((sources, ideal))]
