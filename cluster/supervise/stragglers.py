"""Which rank is slow, and how long may a step be silent? Told from what ranks report, and nothing else.

A step takes all ranks equally long, for in its collectives they wait for the slowest. What tells them apart is what each spent by itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, median_low

from manta.cluster.supervise.failure import Limits, RankStatus

SLOW, RECOVERED = 1.5, 1.2  # times the median
LOOKS = 5  # at as many different steps, one after the other
NOISE = 0.01  # seconds of a step: a smaller difference is no news
SHORTEST, LONGEST = 30.0, 300.0  # seconds, between which lies what is learned
PATIENCE = 20  # times the longest silence
KNOWN = 20  # silences, of every rank, from which on they tell something


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    """A rank whose `work` is so many `times` the `median` rank's: seconds of `step`."""

    rank: int
    times: float
    step: int
    work: float
    median: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What was seen so far of one attempt."""

    step: int = -1  # at the last look
    times: Mapping[int, tuple[float, ...]] = field(default_factory=dict[int, tuple[float, ...]])  # by rank, of the last looks
    told: frozenset[int] = frozenset()


def slow(statuses: Sequence[RankStatus], before: Pace) -> tuple[Pace, list[Slow]]:
    """What is known now, and which ranks are to be told of: slow at each of the last looks, and not told of since they last kept pace.

    There is a look once every rank has got further than at the last. With two ranks the faster one is the median.
    """
    known = [status for status in statuses if status.code is None and status.work > 0]
    step = min((status.step for status in known), default=-1)
    if len(known) < 2 or step <= before.step:
        return before, []
    middle = median_low(status.work for status in known)
    now = {status.rank: status.work / middle if status.work - middle > NOISE else 1.0 for status in known}
    times = {rank: (*before.times.get(rank, ()), ratio)[-LOOKS:] for rank, ratio in now.items()}
    lagging = {rank for rank, seen in times.items() if len(seen) == LOOKS and min(seen) > SLOW}
    told = {rank for rank in before.told if max(times.get(rank, before.times[rank])) > RECOVERED}
    new = [
        Slow(rank=status.rank, times=round(median(times[status.rank]), 2), step=status.step, work=status.work, median=middle)
        for status in known
        if status.rank in lagging - told
    ]
    return Pace(step=step, times={**before.times, **times}, told=frozenset(told | lagging)), new


def limits(statuses: Sequence[RankStatus], *, start: float, step: float | None) -> Limits:
    """How long ranks may be silent. step: None where it is learned, from their silences so far: then 300 s until enough are known."""
    if step is not None:
        return Limits(start=start, step=step, other=step)
    alive = [status for status in statuses if status.code is None]
    learned = LONGEST
    if alive and min(status.intervals for status in alive) >= KNOWN:
        learned = min(LONGEST, max(SHORTEST, PATIENCE * max(status.longest for status in alive)))
    return Limits(start=start, step=learned, other=LONGEST)
