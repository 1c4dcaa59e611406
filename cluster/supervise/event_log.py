"""The event log, `events.jsonl`: one JSON object per line, flushed to disk before the run continues."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, create_model

from manta.cluster.line_file import LineFile
from manta.cluster.protocol import ExitCode, open_regular, read_lines
from manta.cluster.supervise.failure import Cause

POLL = "poll"  # the kind of event that only reports the ranks' progress; it is not written to the log


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`time` is seconds since the epoch; `attempt` is 0 before the first."""

    kind: str
    attempt: int
    time: float
    details: dict[str, Any] = field(default_factory=dict[str, Any])


class _Line(BaseModel):
    """What every line of the log has."""

    model_config = ConfigDict(strict=True, extra="allow")

    time: Annotated[float, Field(ge=0, le=1e12)]
    event: Annotated[str, Field(max_length=100)]
    attempt: Annotated[int, Field(ge=0, le=10**9)]


_Number = Annotated[int, Field(ge=0, le=10**15)]
_OptionalNumber = Annotated[int | None, Field(ge=0, le=10**15)]
_Text = Annotated[str, Field(max_length=1 << 18)]
_Node = create_model("_Node", __config__=ConfigDict(strict=True, extra="allow"), address=(_Text, ...))
_MACHINE: dict[str, Any] = {"host": (_Text, ""), "address": (_Text, ""), "machine": (_Text, "")}
_KEYS: dict[str, dict[str, Any]] = {
    # kind: the keys that readers of such an event rely on. `...`: each line has it. Older versions wrote fewer keys, newer ones write more.
    "waiting": {"message": (_Text, ...)},
    "nodes-gathered": {"ranks": (_Number, ...), "nodes": (list[_Node], ...)},
    "node-ready": {"host": (_Text, ...), "address": (_Text, ...), "differs": (list[_Text], [])},
    "node-unfit": {"message": (_Text, ...)},
    "attempt-started": {"ranks": (list[dict[str, Any]], ...)},
    "loaded": {"step": (_Number, ...)},
    "first-step": {"step": (_Number, ...)},
    "rank-failed": {
        "rank": (_OptionalNumber, ...),
        "cause": (Annotated[str, Field(pattern=f"^({'|'.join(Cause.__members__)})$")], ...),
        "step": (_Number, ...),
        "message": (_Text, ...),
        "traceback": (_Text, ""),
        "noticed_after": (float | None, None),
        **_MACHINE,
    },
    "rank-slow": {
        "rank": (_Number, ...),
        "node": (_Text, ...),
        "step": (_Number, ...),
        "ratio": (float, Field(gt=0, validation_alias=AliasChoices("ratio", "times"))),  # times: the name in older event logs
        "work": (float, ...),
        "median": (float, ...),
    },
    "node-lost": {
        "node": (_Number, ...),
        "message": (_Text, ...),
        "suspect": (bool, False),
        "announced": (bool, False),
        "trusted_again": (float | None, None),
        **_MACHINE,
    },
    "nodes-appeared": {"ranks": (_Number, ...)},
    "nodes-draining": {"nodes": (list[_Text], ...), "here": (bool, ...)},
    "decided": {"decision": (_Text, ...), "reason": (_Text, ""), "exclude": (list[_Text], []), "leave_out": (list[_Text], [])},
    "leaving": {"signal": (str | None, None)},
    "spike": (_FROM_RANK := {"step": (_Number, ...), "message": (_Text, ...), "action": (_Text, ...)}),
    "not-finite": _FROM_RANK,
    "tracker-ended": {"message": (_Text, ...), "starts": (_Number, ...)},
    "disk-full": {"message": (_Text, ...), "unwritten": (_Number, ...)},
    "run-ended": {"exit_code": (Annotated[int, AfterValidator(ExitCode)], ...), "message": (_Text, "")},
}
_MODELS: Mapping[str, type[_Line]] = {kind: create_model(kind, __base__=_Line, **keys) for kind, keys in _KEYS.items()}


class EventLog:
    """Appends events."""

    def __init__(self, path: Path) -> None:
        self.file = LineFile(path, sync=True)

    def write(self, event: Event) -> None:
        self.file.write(json.dumps(line_of(event), allow_nan=False).encode())

    def close(self) -> None:
        self.file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events so far, in order; an empty list if the file does not exist. Skips lines that are incomplete or damaged.

    Raises OSError if the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            return list(read_lines(file, parse_event, path=path))
    except FileNotFoundError:
        return []


def exit_code(events: Sequence[dict[str, Any]]) -> int | None:
    """Return the exit code with which the last start of a run has ended; None if it has not ended."""
    return events[-1]["exit_code"] if events and events[-1]["event"] == "run-ended" else None


def parse_event(line: bytes) -> dict[str, Any]:
    """Return the event of a line of the log. Raises ValueError if a key is missing, or of another type, that readers rely on."""
    event = json.loads(line)
    kind = event.get("event") if isinstance(event, dict) else None
    (_MODELS.get(kind, _Line) if isinstance(kind, str) else _Line).model_validate(event)
    return event


def line_of(event: Event) -> dict[str, Any]:
    """Return the line that is written for an event."""
    return {"time": event.time, "event": event.kind, "attempt": event.attempt, **event.details}


def event_of(line: dict[str, Any]) -> Event:
    """Return the event from which a line was written."""
    details = {key: value for key, value in line.items() if key not in {"time", "event", "attempt"}}
    return Event(kind=line["event"], attempt=line["attempt"], time=line["time"], details=details)
