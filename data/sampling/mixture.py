"""Which source gives sample g, and which of that source's samples it is: by weights that change in stages, each answer in closed form.

A stage repeats a period of 65,536 places, in which each source stands as often as its weight asks, as evenly as can be: its k-th place
of c is as near as it gets to (k + 1/2) / c of the way. So any batch holds nearly its share of every source, and how many samples of a
source came before g is a multiplication and a look-up. A source's own samples are counted through all stages: none is lost between them.

The table is part of every run's identity. It may never change under one `VERSION`; golden vectors in the tests hold it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VERSION = 1
PERIOD = 2**16

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class _Stage:
    first: int  # its first sample number
    before: Numbers  # [S]: samples of each source in the stages before it
    counts: Numbers  # [S]: in a period
    sources: Numbers  # [PERIOD]
    ranks: Numbers  # [PERIOD]: which of its source's places in the period this is

    def taken(self, number: int) -> Numbers:
        """[S]: of each source before this sample number, which lies in the stage or ends it."""
        periods, rest = divmod(number - self.first, PERIOD)
        return self.before + periods * self.counts + np.bincount(self.sources[:rest], minlength=len(self.counts))


class Mixture:
    """S sources by weight."""

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]]) -> None:
        """stages: (first sample number, a weight >= 0 of each source); the first begins at 0, each has some weight."""
        self._stages: list[_Stage] = []
        for first, weights in stages:
            before = self._stages[-1].taken(first) if self._stages else np.zeros(len(weights), dtype=np.int64)
            counts = quotas(weights)
            sources = spread(counts)
            ranks = np.empty(PERIOD, dtype=np.int64)
            for source, count in enumerate(counts.tolist()):
                ranks[sources == source] = np.arange(count)
            self._stages.append(_Stage(first, before, counts, sources, ranks))
        self._firsts = np.array([first for first, _ in stages], dtype=np.int64)

    def __call__(self, numbers: NDArray[np.integer]) -> tuple[Numbers, Numbers]:
        """Sample numbers [K] -> their sources [K], and which sample of its source each is [K]."""
        numbers = np.asarray(numbers, dtype=np.int64)
        sources, own = np.empty_like(numbers), np.empty_like(numbers)
        stages = np.searchsorted(self._firsts, numbers, side="right") - 1
        for index in np.unique(stages):
            stage, here = self._stages[index], stages == index
            periods, places = np.divmod(numbers[here] - stage.first, PERIOD)
            sources[here] = taken = stage.sources[places]
            own[here] = stage.before[taken] + periods * stage.counts[taken] + stage.ranks[places]
        return sources, own

    def taken(self, number: int) -> Numbers:
        """[S]: samples of each source among the first `number`."""
        return self._stages[bisect_right(self._firsts.tolist(), number) - 1].taken(number)


def quotas(weights: Sequence[float]) -> Numbers:
    """Of a period's places how many each source has, nearest to its weight; none that has a weight goes without."""
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights) * PERIOD
    counts = np.where(shares > 0, np.maximum(np.floor(shares), 1), 0).astype(np.int64)
    lacking = np.argsort(counts - shares, kind="stable")  # who is furthest below its share comes first
    while missing := PERIOD - int(counts.sum()):
        if missing > 0:
            counts[lacking[:missing]] += 1
        else:
            counts[np.argmax(counts)] -= 1
    return counts


def spread(counts: Numbers) -> Numbers:
    """[PERIOD] sources, each `counts` times and evenly: places sorted by where they would best stand, in whole numbers."""
    sources = np.repeat(np.arange(len(counts)), counts)
    turns = np.concatenate([np.arange(count) for count in counts.tolist()])
    ideal = ((2 * turns + 1) << 44) // counts[sources]
    return sources[np.lexsort((sources, ideal))]
