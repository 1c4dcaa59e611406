"""How a run stands: a pure function of the events so far. A controller that is killed is followed by one that reads them again."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from manta.cluster.supervise.event_log import Event
from manta.cluster.supervise.failure import Cause, Failure

Phase = Literal["ended", "gathering", "starting", "running", "leaving", "deciding"]

TRANSITIONS: dict[str, tuple[frozenset[Phase] | None, Phase | None]] = {
    # event: the phases it may come in (None: any), and the one it leads to (None: the same)
    "run-started": (None, "gathering"),
    "waiting": (frozenset({"gathering"}), None),
    "nodes-gathered": (frozenset({"gathering"}), "starting"),
    "node-ready": (frozenset({"starting"}), None),
    "node-unfit": (frozenset({"starting"}), None),
    "attempt-started": (frozenset({"starting"}), "running"),
    "first-step": (frozenset({"running"}), None),
    "rank-failed": (frozenset({"running", "leaving"}), None),
    "node-lost": (frozenset({"gathering", "starting", "running", "leaving"}), None),
    "nodes-appeared": (frozenset({"running"}), None),
    "nodes-draining": (frozenset({"running"}), None),
    "head-lost": (frozenset({"running"}), None),
    "leaving": (frozenset({"running"}), "leaving"),
    "attempt-stopped": (frozenset({"starting", "running", "leaving"}), "deciding"),
    "decided": (frozenset({"deciding", "gathering"}), "gathering"),
    "run-ended": (None, "ended"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """`history`: the failures since a person started the run, oldest first. `suspects`: machines that are not to be used, by id, and the
    time from which they are again; infinite for good.
    """

    phase: Phase = "ended"
    attempt: int = 0
    step: int = 0
    history: tuple[Failure, ...] = ()
    suspects: Mapping[str, float] = field(default_factory=dict[str, float])
    has_begun: bool = False  # there were nodes enough, once


def advance(state: RunState, event: Event) -> RunState:
    """The state after an event. Raises ValueError where it can not come in this one."""
    allowed, _ = TRANSITIONS.get(event.kind, (None, None))
    if allowed is not None and state.phase not in allowed:
        raise ValueError(f"{event.kind} in phase {state.phase}, wants one of {', '.join(sorted(allowed))}")
    return _after(state, event)


def _after(state: RunState, event: Event) -> RunState:  # noqa: PLR0911  a table: a case a kind
    _, phase = TRANSITIONS.get(event.kind, (None, None))
    after = replace(state, phase=phase or state.phase, attempt=max(state.attempt, event.attempt))
    match event.kind:
        case "poll":
            return replace(after, step=max((rank["step"] for rank in event.details["ranks"]), default=state.step))
        case "run-started" if state.phase == "ended":  # else the one before was broken off: what had failed stays told
            return replace(after, history=(), suspects={}, has_begun=False)
        case "nodes-gathered":
            return replace(after, has_begun=True)
        case "rank-failed":
            return replace(after, history=(*after.history, _failure(event.details)), step=event.details["step"])
        case "node-lost":
            message, machine = f"node {event.details['node']}: {event.details['message']}", event.details.get("machine", "")
            cause = Cause.PREEMPTED if event.details.get("announced") else Cause.NODE_LOST
            lost = Failure(cause=cause, rank=None, step=state.step, message=message, machine=machine)
            suspects = {machine: event.details.get("trusted_again") or math.inf} if event.details.get("suspect") else {}
            return replace(after, history=(*after.history, lost), suspects={**after.suspects, **suspects})
        case "node-unfit":
            wrong = Failure(cause=Cause.INPUT, rank=None, step=state.step, message=event.details["message"])
            return replace(after, history=(*after.history, wrong))
        case "decided":
            return replace(after, suspects={**after.suspects, **dict.fromkeys(event.details.get("leave_out", ()), math.inf)})
        case _:
            return after


def replay(events: Iterable[dict[str, Any]]) -> RunState:
    """The state that a journal's lines lead to, also where some are lost, or an older manta wrote others."""
    state = RunState()
    for line in events:
        details = {key: value for key, value in line.items() if key not in {"event", "attempt", "time"}}
        state = _after(state, Event(kind=line["event"], attempt=line["attempt"], time=line["time"], details=details))
    return state


def _failure(told: dict[str, Any]) -> Failure:
    return Failure(
        cause=Cause[told["cause"]], rank=told["rank"], step=told["step"], message=told["message"], machine=told.get("machine", "")
    )
