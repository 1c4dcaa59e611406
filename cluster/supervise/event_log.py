"""What happened, in order: `events.jsonl`, one JSON object a line, appended and flushed to disk before the run goes on."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

POLL = "poll"  # the kind of the events that only say how far the ranks are; they are not kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`time` is seconds since the epoch; `attempt` is 0 outside any."""

    kind: str
    attempt: int
    time: float
    details: dict[str, Any] = field(default_factory=dict[str, Any])


class Journal:
    """Append-only. What an earlier controller wrote stays; a line it could not finish is closed, so that it spoils no other."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab+")
        self._file.seek(0)
        earlier = self._file.read()
        self.last_attempt = max((int(event["attempt"]) for event in whole_events(earlier)), default=0)
        if earlier and not earlier.endswith(b"\n"):
            self._file.write(b"\n")

    def write(self, event: Event) -> None:
        line = {"time": event.time, "event": event.kind, "attempt": event.attempt, **event.details}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events so far, in order; none where there is no file yet. A line that is being written, or was cut off, is left out."""
    return list(whole_events(path.read_bytes())) if path.exists() else []


def whole_events(journal: bytes) -> Iterator[dict[str, Any]]:
    """Those of a part of a journal that begins with a whole line."""
    for line in journal[: journal.rfind(b"\n") + 1].splitlines():
        with suppress(ValueError):  # cut off, and closed by the next controller
            yield json.loads(line)


def as_event(line: dict[str, Any]) -> Event:
    """A line of the journal as what it was written from."""
    details = {key: value for key, value in line.items() if key not in {"time", "event", "attempt"}}
    return Event(kind=line["event"], attempt=line["attempt"], time=line["time"], details=details)
