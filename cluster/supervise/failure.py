"""What ended an attempt, and what to do next: pure functions of what the agents reported."""

import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from manta.cluster.nodes.report import RankStatus
from manta.cluster.protocol import ExitCode

PEER_ERRORS = ("reset by peer", "closed by peer", "Broken pipe", "remote process exited")  # messages of gloo and NCCL
STOPPED = frozenset({ExitCode.SAVED, ExitCode.UNSAVED})  # exit codes of a rank that was asked to stop
BACKOFF, MAX_BACKOFF = 1.0, 60.0  # seconds before the second restart in a row; doubles up to the maximum
MAX_FAILURES_ON_MACHINE = 1  # without progress between them; a machine with more is excluded


class Cause(Enum):
    """Why an attempt ended. The names are in the event log; those of the first five are a RankError's categories, in capitals."""

    EXCEPTION = "a rank raised an exception"
    INPUT = "the user's input is invalid"
    UNRECOVERABLE = "every other attempt would fail in the same way"
    HOPELESS = UNRECOVERABLE  # the name in older event logs
    OUT_OF_MEMORY = "a rank ran out of memory"
    SPIKE = "the loss jumped: the ranks go back to a checkpoint, and skip the samples"
    SIGNAL = "a rank was killed by a signal"
    HANG = "a rank sent no heartbeat in time"
    NODE_LOST = "a node is lost"
    PREEMPTED = "the cluster took a node away, and had announced it"


UNCOUNTED = frozenset({Cause.PREEMPTED, Cause.SPIKE})
"""No failures of a rank or machine. The cluster limits the number of the one, the ranks that of the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an attempt ended. `rank`: the first to fail. `step`: the last finished. `machine`: of the rank, or the lost one."""

    cause: Cause
    rank: int | None
    step: int
    message: str
    machine: str = ""


class Restart(NamedTuple):
    after: float  # seconds


class GiveUp(NamedTuple):
    reason: str
    exit_code: int = ExitCode.FAILED


def decide(history: Sequence[Failure], *, max_restarts_without_progress: int) -> Restart | GiveUp:
    """Return what to do after the last failure in `history` (oldest first, not empty).

    An attempt that got further than any before it resets the count of restarts. The same exception at the same step twice in a row is for
    the user to fix. A preemption does not count, nor does a spike.
    """
    last = history[-1]
    if last.cause in UNCOUNTED:
        return Restart(after=0.0)
    if (fatal := _fatal(last)) is not None:
        return fatal
    failures = [failure for failure in history if failure.cause not in UNCOUNTED]
    if last.cause is Cause.EXCEPTION and len(failures) > 1 and replace(failures[-2], rank=last.rank, machine=last.machine) == last:
        return GiveUp(reason=f"rank {last.rank} failed twice at step {last.step} with the same error: {last.message}")
    attempts = len(failures_without_progress(failures))
    if attempts > max_restarts_without_progress:
        furthest = max(failure.step for failure in failures)
        return GiveUp(reason=f"{attempts} attempts without a step beyond {furthest}; the last failure: {last.message}")
    return Restart(after=0.0 if attempts == 1 else min(MAX_BACKOFF, BACKOFF * 2 ** (attempts - 2)))


def _fatal(failure: Failure) -> GiveUp | None:
    """Give up after a failure that no restart can fix."""
    match failure.cause:
        case Cause.INPUT:
            return GiveUp(reason=failure.message, exit_code=ExitCode.USAGE)
        case Cause.UNRECOVERABLE:
            return GiveUp(reason=failure.message)
        case Cause.OUT_OF_MEMORY:
            return GiveUp(reason=f"rank {failure.rank}: {failure.message}. Lower train.micro_batch.")
        case _:
            return None


def failures_without_progress(history: Sequence[Failure]) -> Sequence[Failure]:
    """Return the failures since the run last got further than ever before."""
    furthest, since = -1, 0
    for number, failure in enumerate(history):
        if failure.step > furthest:
            furthest, since = failure.step, number
    return history[since:]


def failing_machines(history: Sequence[Failure]) -> set[str]:
    """Return the machines on which the run keeps failing without progress."""
    failures = failures_without_progress(history)
    counts = Counter(failure.machine for failure in failures if failure.machine and failure.cause not in UNCOUNTED)
    return {machine for machine, failures in counts.items() if failures > MAX_FAILURES_ON_MACHINE}


def first_failure(exited: Sequence[RankStatus]) -> RankStatus:
    """Return the rank that caused the others to fail: the first to exit, with these exceptions.

    A signal outranks an exception: a killed rank closes its peers' connections, and a peer's exit may be noticed first. SIGABRT does not:
    libraries raise it when a peer is gone. A rank that failed because a peer was gone comes last.
    """
    return min(exited, key=lambda status: (not _is_killed(status), is_peer_failure(status), status.exited_at, status.rank))


def is_peer_failure(status: RankStatus) -> bool:
    """Whether a rank failed because it lost the connection to another."""
    return status.error is not None and any(words in status.error.message for words in PEER_ERRORS)


def failure_of(status: RankStatus) -> Failure:
    """Convert a rank's exit status into a failure."""
    assert status.code is not None
    is_oom = status.error is not None and status.error.category == "out_of_memory"
    if status.code < 0 and not is_oom and (status.error is None or _is_killed(status)):
        cause, message = Cause.SIGNAL, f"killed by {signal.Signals(-status.code).name}"
    elif status.error is None:
        last_line = (status.tail.strip().splitlines() or ["no output"])[-1]
        cause, message = Cause.EXCEPTION, f"exit code {status.code}: {last_line}"
    else:
        cause, message = Cause[status.error.category.upper()], f"{status.error.type}: {status.error.message}"
    return Failure(cause=cause, rank=status.rank, step=status.step, message=message)


def _is_killed(status: RankStatus) -> bool:
    return status.code is not None and status.code < 0 and status.code != -signal.SIGABRT
