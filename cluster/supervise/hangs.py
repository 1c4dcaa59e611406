"""Detect a hung rank: one that has sent no heartbeat for too long. The limit for a step is learned from the steps so far."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from manta.cluster.nodes.report import RankStatus
from manta.cluster.supervise.failure import Cause, Failure

BLOCKING_PHASES = frozenset({"read", "compile"})  # a rank may take long in these, while the others wait for it in phase "step"
MIN_STEP_LIMIT, MAX_STEP_LIMIT = 30.0, 300.0  # seconds, the bounds of a learned limit
STEP_LIMIT_FACTOR = 20  # times the longest interval between heartbeats
MIN_INTERVALS = 20  # intervals of every rank before the limit is learned


class HangLimits(NamedTuple):
    """Seconds without a heartbeat after which a rank counts as hung."""

    start: float  # before its first step, and in phases compile and save
    step: float
    other: float  # in phases read, evaluate and done

    def limit(self, status: RankStatus) -> float:
        if not status.has_stepped or status.phase in {"compile", "save"}:
            return self.start
        return self.step if status.phase == "step" else self.other


def hang_limits(statuses: Sequence[RankStatus], *, start: float, step: float | None) -> HangLimits:
    """Return how long ranks may send no heartbeat. step: None if it is learned; it is the maximum until enough intervals are known."""
    if step is not None:
        return HangLimits(start=start, step=step, other=step)
    running = [status for status in statuses if status.code is None]
    learned = MAX_STEP_LIMIT
    if running and min(status.intervals for status in running) >= MIN_INTERVALS:
        longest = max(status.longest for status in running)
        learned = min(MAX_STEP_LIMIT, max(MIN_STEP_LIMIT, STEP_LIMIT_FACTOR * longest))
    return HangLimits(start=start, step=learned, other=MAX_STEP_LIMIT)


def detect_hang(statuses: Sequence[RankStatus], limits: HangLimits, *, waiting: Collection[int] = ()) -> Failure | None:
    """Return a failure if a rank has sent no heartbeat for too long. waiting: ranks that are known to wait in a collective.

    One hung rank blocks all others, so the quietest rank is often not the cause. In order of preference, the failure names a stopped
    process, the rank with the fewest steps, a rank that others may wait for (by its phase, or because it is in no collective), and the
    quietest rank. Ranks that never sent a heartbeat are all named.
    """
    running = [status for status in statuses if status.code is None]
    blocking = max((limits.limit(status) for status in running if status.phase in BLOCKING_PHASES), default=0.0)
    if not any(status.silent_seconds > max(limits.limit(status), blocking if status.phase == "step" else 0.0) for status in running):
        return None
    hung = min(running, key=lambda s: (s.state != "T", s.step, s.phase not in BLOCKING_PHASES, s.rank in waiting, -s.silent_seconds))
    if silent := [str(status.rank) for status in running if not status.phase]:
        message = f"no heartbeat for {hung.silent_seconds:.1f} s from rank {', '.join(silent)}"
    else:
        detail = ""
        if hung.state == "T":
            detail = ", its process is stopped"
        elif waiting and hung.rank not in waiting:
            detail = ", while others wait for it in a collective"
        message = f"rank {hung.rank} sent no heartbeat for {hung.silent_seconds:.1f} s in phase {hung.phase}{detail}"
    return Failure(cause=Cause.HANG, rank=hung.rank, step=hung.step, message=message)
