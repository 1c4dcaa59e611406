"""What happened, in order: `events.jsonl`, one JSON object a line, appended and flushed to disk before the run goes on."""

import json
import os
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
        self.last_attempt = max((attempt for line in earlier.splitlines() if (attempt := _attempt(line)) is not None), default=0)
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


def _attempt(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["attempt"])
    except (ValueError, KeyError, TypeError):  # torn, or not ours
        return None
