"""What ended an attempt, and what to do about it: decisions, made from what was seen and nothing else."""

import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from manta.cluster.protocol import ExitCode, RankError

HELD_UP = frozenset({"read", "compile"})  # phases of a step in which a rank may be long, while the others wait for it in phase "step"
PEER_IS_GONE = ("reset by peer", "closed by peer", "Broken pipe", "remote process exited")  # as gloo and NCCL say it
STOPPED = frozenset({ExitCode.SAVED, ExitCode.UNSAVED})  # of a rank that was asked to stop


class Cause(Enum):
    """Why an attempt ended, as far as the evidence goes."""

    EXCEPTION = "a rank raised"
    INPUT = "the user's input is wrong"
    HOPELESS = "another try would meet the same"
    OUT_OF_MEMORY = "a rank ran out of memory"
    SIGNAL = "a rank was killed by a signal"
    HANG = "no step in time"
    NODE_LOST = "a node is gone"
    PREEMPTED = "the cluster asked us to leave"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """One rank as its agent sees it. `code` is None while it lives; negative, it names a signal. `quiet`: seconds since its last beat.

    `work`: seconds of its last step that it spent by itself; 0 where that is not known. `intervals` between beats in phase "step" have been
    seen, the `longest` of so many seconds.
    """

    rank: int
    pid: int
    step: int
    phase: str
    quiet: float
    has_stepped: bool
    state: str = ""
    code: int | None = None
    exited_at: float = 0.0
    error: RankError | None = None
    tail: str = ""
    work: float = 0.0
    intervals: int = 0
    longest: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Seconds without a sign of life after which a rank counts as hung, by what it does."""

    start: float  # until its first step, and as it compiles or saves
    step: float
    other: float  # as it reads, evaluates or ends

    def of(self, status: RankStatus) -> float:
        if not status.has_stepped or status.phase in {"compile", "save"}:
            return self.start
        return self.step if status.phase == "step" else self.other


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One ended attempt. `rank` is the first to fail: the others fell over it. `step` is the last it finished. `machine`: where."""

    cause: Cause
    rank: int | None
    step: int
    message: str
    machine: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How much the run may cost before a person is asked."""

    max_restarts_without_progress: int = 3
    backoff: float = 1.0  # seconds before the second restart in a row; doubles
    longest_backoff: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    after: float  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    reason: str
    exit_code: int = ExitCode.FAILED


def decide(history: Sequence[Failure], policy: Policy) -> Restart | GiveUp:
    """The next move after the last failure in `history` (oldest first, never empty).

    Progress forgives: an attempt that got further than any before it starts the count anew. The same exception at the same step
    twice in a row is the user's to mend. A preemption costs nothing.
    """
    last = history[-1]
    if last.cause is Cause.PREEMPTED:
        return Restart(after=0.0)
    if (beyond := _beyond_help(last)) is not None:
        return beyond
    failures = [f for f in history if f.cause is not Cause.PREEMPTED]
    if last.cause is Cause.EXCEPTION and len(failures) > 1 and _alike(failures[-2], last):
        return GiveUp(reason=f"rank {last.rank} failed twice at step {last.step} with the same error: {last.message}")
    tries = len(without_progress(failures))
    if tries > policy.max_restarts_without_progress:
        return GiveUp(reason=f"{tries} attempts and no step beyond {max(f.step for f in failures)}; the last: {last.message}")
    return Restart(after=0.0 if tries == 1 else min(policy.longest_backoff, policy.backoff * 2 ** (tries - 2)))


def _beyond_help(failure: Failure) -> GiveUp | None:
    """What no restart mends: bad input, too little memory, and what the rank itself calls hopeless."""
    match failure.cause:
        case Cause.INPUT:
            return GiveUp(reason=failure.message, exit_code=ExitCode.USAGE)
        case Cause.HOPELESS:
            return GiveUp(reason=failure.message)
        case Cause.OUT_OF_MEMORY:
            return GiveUp(reason=f"rank {failure.rank}: {failure.message}; lower train.micro_batch")
        case _:
            return None


def guilty(exited: Sequence[RankStatus]) -> RankStatus:
    """The rank whose end is the cause. The first to exit, but a signal outranks an exception: a rank that is killed takes its peers'
    connections with it, and one of them may be told of sooner. Not so SIGABRT: it is how libraries raise when a peer is gone. One that
    raised just that, that a peer is gone, comes last.
    """
    return min(exited, key=lambda s: (not _is_killed(s), blames_a_peer(s), s.exited_at, s.rank))


def blames_a_peer(status: RankStatus) -> bool:
    """Whether it fell because another had."""
    return status.error is not None and any(words in status.error.message for words in PEER_IS_GONE)


def stalled(statuses: Sequence[RankStatus], limits: Limits, *, waiting: Collection[int] = ()) -> Failure | None:
    """The failure that silence amounts to, if some rank has given no sign of life for too long. waiting: ranks that are known to be in a
    collective.

    One hung rank stops all, so the quietest is often not the guilty one: a stopped process is named first, then the rank with the
    fewest steps, then one that the others may be waiting for, by its phase or as it is in no collective, then the quietest. Ranks that
    never came up are named all.
    """
    alive = [s for s in statuses if s.code is None]
    others = max((limits.of(s) for s in alive if s.phase in HELD_UP), default=0.0)
    if not any(s.quiet > max(limits.of(s), others if s.phase == "step" else 0.0) for s in alive):
        return None
    named = min(alive, key=lambda s: (s.state != "T", s.step, s.phase not in HELD_UP, s.rank in waiting, -s.quiet))
    if missing := [str(s.rank) for s in alive if not s.phase]:
        message = f"no sign of life within {named.quiet:.1f} s from rank {', '.join(missing)}"
    else:
        more = ""
        if named.state == "T":
            more = ", its process is stopped"
        elif waiting and named.rank not in waiting:
            more = ", while others wait for it in a collective"
        message = f"rank {named.rank} gave no sign of life for {named.quiet:.1f} s in phase {named.phase}{more}"
    return Failure(cause=Cause.HANG, rank=named.rank, step=named.step, message=message)


def explain(status: RankStatus) -> Failure:
    """The failure that a rank's exit amounts to."""
    assert status.code is not None
    starved = status.error is not None and status.error.category == "out_of_memory"
    if status.code < 0 and not starved and (status.error is None or _is_killed(status)):
        cause, message = Cause.SIGNAL, f"killed by {signal.Signals(-status.code).name}"
    elif status.error is None:
        last_line = (status.tail.strip().splitlines() or ["it said nothing"])[-1]
        cause, message = Cause.EXCEPTION, f"exit code {status.code}: {last_line}"
    else:
        cause, message = Cause[status.error.category.upper()], f"{status.error.type}: {status.error.message}"
    return Failure(cause=cause, rank=status.rank, step=status.step, message=message)


def _is_killed(status: RankStatus) -> bool:
    return status.code is not None and status.code < 0 and status.code != -signal.SIGABRT


def _alike(one: Failure, other: Failure) -> bool:
    return (one.cause, one.step, one.message) == (other.cause, other.step, other.message)


def without_progress(failures: Sequence[Failure]) -> Sequence[Failure]:
    """Those since the run last got further than ever before."""
    furthest, since = -1, 0
    for number, failure in enumerate(failures):
        if failure.step > furthest:
            furthest, since = failure.step, number
    return failures[since:]
