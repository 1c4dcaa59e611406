"""Find ranks that are slower than the others, from what ranks report in their heartbeats.

A step takes the same time on all ranks: in collectives each waits for the slowest. So ranks are compared by `work`, the seconds that each
spent on its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, median_low

from manta.cluster.nodes.report import RankStatus

SLOW, RECOVERED = 1.5, 1.2  # times the median
CHECKS = 5  # consecutive checks, each at another step
LASTING = 30.0  # seconds, in addition, on one machine without GPUs, where the ranks share the cores with other programs
NOISE = 0.01  # seconds of a step: a smaller difference is ignored


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """A rank whose `work` in `step`, in seconds, is `ratio` times the `median`. The names are those of the event's fields."""

    rank: int
    ratio: float
    step: int
    work: float
    median: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkHistory:
    """The checks of one attempt so far. `ratios`: of each rank's work to the median, newest last."""

    step: int = -1  # of the last check
    ratios: Mapping[int, tuple[float, ...]] = field(default_factory=dict[int, tuple[float, ...]])
    reported: frozenset[int] = frozenset()
    slow_since: Mapping[int, float] = field(default_factory=dict[int, float])


def find_stragglers(
    statuses: Sequence[RankStatus], history: WorkHistory, *, now: float = 0.0, lasting: float = 0.0
) -> tuple[WorkHistory, list[Straggler]]:
    """Return the new history, and the ranks that were slow at each of the last checks and were not reported since they last recovered.

    A check happens once every rank has got further than at the last one. Of two ranks the faster one is the median.
    lasting: seconds for which a rank must have been slow, in the median of each check and those before it.
    """
    known = [status for status in statuses if status.code is None and status.work > 0]
    step = min((status.step for status in known), default=-1)
    if len(known) < 2 or step <= history.step:
        return history, []
    middle = median_low(status.work for status in known)
    newest = {status.rank: status.work / middle if status.work - middle > NOISE else 1.0 for status in known}
    ratios = {**history.ratios, **{rank: (*history.ratios.get(rank, ()), ratio)[-CHECKS:] for rank, ratio in newest.items()}}
    since = {rank: history.slow_since.get(rank, now) for rank in newest if median(ratios[rank]) > SLOW}
    slow = {rank for rank in since if len(ratios[rank]) == CHECKS and min(ratios[rank]) > SLOW and now - since[rank] >= lasting}
    reported = {rank for rank in history.reported if max(ratios[rank]) > RECOVERED}
    stragglers = [
        Straggler(rank=status.rank, ratio=round(median(ratios[status.rank]), 2), step=status.step, work=status.work, median=middle)
        for status in known
        if status.rank in slow - reported
    ]
    return WorkHistory(step=step, ratios=ratios, reported=frozenset(reported | slow), slow_since=since), stragglers
