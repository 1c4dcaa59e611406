"""What a run has logged so far, and how a script waits for what it logs next."""

import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from manta.cluster.supervise.event_log import POLL, Event
from manta.launch.tail import Tail
from manta.trainer.metrics import Line, parse_lines
from manta.trainer.run_directory import RunDirectory

T = TypeVar("T")
Script = Generator[None, None, T]
"""Runs until its next `yield`, and continues at the next event of the run."""


class RunMonitor:
    """Collects a run's events and metrics. `lines` are in the order of writing: a step that was recomputed has two."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.events: list[Event] = []
        self.lines: list[Line] = []
        self._metrics = Tail(run.metrics_file)

    def add(self, event: Event) -> None:
        if event.kind != POLL:
            self.events.append(event)
        self.lines += parse_lines(self._metrics.lines().decode())

    @property
    def step(self) -> int:
        """The step of the newest line."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def furthest_step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def attempt(self) -> int:
        """The number of the newest attempt."""
        return self._newest("attempt-started").attempt

    @property
    def ranks(self) -> list[dict[str, Any]]:
        """The newest attempt's ranks, with their process ids and nodes."""
        return self._newest("attempt-started").details["ranks"]

    @property
    def nodes(self) -> list[dict[str, Any]]:
        return self._newest("nodes-gathered").details["nodes"]

    @property
    def newest_checkpoint(self) -> str:
        """Its name; "" if there is none."""
        return next(iter(self.run.open_checkpoints().names()), "")

    def event_after(self, when: float, *kinds: str) -> Event | None:
        """Return the first event of these kinds after a time."""
        return next((event for event in self.events if event.kind in kinds and event.time > when), None)

    def line_after_attempt(self, attempt: int) -> Line | None:
        """Return the first line of a later attempt."""
        return next((line for line in self.lines if line["attempt"] > attempt), None)

    def line_with(self, key: str, when: float) -> Line | None:
        """Return the first line after a time in which `key` is present and not 0."""
        return next((line for line in self.lines if line["time"] > when and line.get(key)), None)

    def _newest(self, kind: str) -> Event:
        return next(event for event in reversed(self.events) if event.kind == kind)


def wait_for(find: Callable[[], T | None], timeout: float) -> Script[T]:
    """Wait until `find` returns something. Raises TimeoutError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while (found := find()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError
        yield
    return found
