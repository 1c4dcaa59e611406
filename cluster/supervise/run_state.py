"""The state of a run, a pure function of its events: a controller that is killed is replaced by one that replays the event log."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from manta.cluster.supervise.event_log import Event, event_of
from manta.cluster.supervise.failure import UNCOUNTED, Cause, Failure

RunPhase = Literal["ended", "gathering", "starting", "running", "leaving", "deciding"]

TRANSITIONS: dict[str, tuple[frozenset[RunPhase] | None, RunPhase | None]] = {
    # event: the phases in which it may happen (None: all), and the phase that follows (None: the same)
    "run-started": (None, "gathering"),
    "waiting": (frozenset({"gathering"}), None),
    "nodes-gathered": (frozenset({"gathering"}), "starting"),
    "node-ready": (frozenset({"starting"}), None),
    "node-unfit": (frozenset({"starting"}), None),
    "attempt-started": (frozenset({"starting"}), "running"),
    "loaded": (frozenset({"running"}), None),  # `step`: of the checkpoint that the ranks resume from; 0 if there is none
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
    """`history`: the failures since the run made progress, oldest first. `suspects`: excluded machines by id, with the time at which
    they may be used again; infinite if never.
    """

    phase: RunPhase = "ended"
    attempt: int = 0
    step: int = 0
    history: tuple[Failure, ...] = ()
    suspects: Mapping[str, float] = field(default_factory=dict[str, float])
    has_started: bool = False  # enough nodes were available once


def advance(state: RunState, event: Event) -> RunState:
    """Return the state after an event. Raises ValueError if the event cannot happen in this state."""
    allowed, _ = TRANSITIONS.get(event.kind, (None, None))
    if allowed is not None and state.phase not in allowed:
        raise ValueError(f"{event.kind}: expected phase {' or '.join(sorted(allowed))}, got {state.phase}")
    return _next(state, event)


def replay(lines: Iterable[dict[str, Any]]) -> RunState:
    """Return the state after the event log's lines, even if some are lost or an older version wrote others."""
    state = RunState()
    for line in lines:
        state = _next(state, event_of(line))
    return state


def _next(state: RunState, event: Event) -> RunState:
    _, phase = TRANSITIONS.get(event.kind, (None, None))
    state_before, details = state, event.details
    state = replace(state, phase=phase or state.phase, attempt=max(state.attempt, event.attempt))
    match event.kind:
        case "poll":
            return replace(state, step=max((rank["step"] for rank in details["ranks"]), default=state.step))
        case "run-started" if state_before.phase == "ended":  # else the controller before was killed, and its failures still count
            return replace(state, history=(), suspects={}, has_started=False)
        case "nodes-gathered":
            return replace(state, has_started=True)
        case "rank-failed" | "node-lost" | "node-unfit":
            return _failed(state, event)
        case "decided":
            excluded = details.get("exclude", details.get("leave_out", ()))  # leave_out: the name in older event logs
            return replace(state, suspects={**state.suspects, **dict.fromkeys(excluded, math.inf)})
        case _:
            return state


def _failed(state: RunState, event: Event) -> RunState:
    details, machine = event.details, event.details.get("machine", "")
    cause, rank, step, message, suspects = Cause.INPUT, None, state.step, details["message"], state.suspects
    match event.kind:
        case "rank-failed":
            cause, rank, step = Cause[details["cause"]], details["rank"], details["step"]
        case "node-lost":
            cause = Cause.PREEMPTED if details.get("announced") else Cause.NODE_LOST
            message = f"node {details['node']}: {message}"
            if details.get("suspect"):
                suspects = {**suspects, machine: details.get("trusted_again") or math.inf}
        case _:
            machine = ""
    failure = Failure(cause=cause, rank=rank, step=step, message=message, machine=machine)
    kept = state.history
    if all(earlier.step < step for earlier in kept):  # no decision depends on what was before the furthest step, unless this does not count
        kept = tuple(earlier for earlier in kept if earlier.cause not in UNCOUNTED) if cause in UNCOUNTED else ()
    return replace(state, history=(*kept, failure), step=step, suspects=suspects)
