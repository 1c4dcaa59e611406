"""The event log, `events.jsonl`: one JSON object per line, flushed to disk before the run continues."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POLL = "poll"  # the kind of event that only reports the ranks' progress; it is not written to the log


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`time` is seconds since the epoch; `attempt` is 0 before the first."""

    kind: str
    attempt: int
    time: float
    details: dict[str, Any] = field(default_factory=dict[str, Any])


class EventLog:
    """Appends events. Ends a line that an earlier controller could not finish, so that it spoils no other."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab+")
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read() != b"\n":
                self._file.write(b"\n")

    def write(self, event: Event) -> None:
        line = {"time": event.time, "event": event.kind, "attempt": event.attempt, **event.details}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events so far, in order; an empty list if the file does not exist. Skips lines that are incomplete."""
    return list(parse_events(path.read_bytes())) if path.exists() else []


def exit_code(events: Sequence[dict[str, Any]]) -> int | None:
    """Return the exit code with which the last start of a run has ended; None if it has not ended."""
    return events[-1]["exit_code"] if events and events[-1]["event"] == "run-ended" else None


def parse_events(text: bytes) -> Iterator[dict[str, Any]]:
    """Parse a part of the log that starts with a whole line."""
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        with suppress(ValueError):  # incomplete, and ended by the next controller
            yield json.loads(line)


def event_of(line: dict[str, Any]) -> Event:
    """Return the event from which a line was written."""
    details = {key: value for key, value in line.items() if key not in {"time", "event", "attempt"}}
    return Event(kind=line["event"], attempt=line["attempt"], time=line["time"], details=details)
