"""What a run has shown so far, and how to wait for what it shows next."""

import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from manta.cluster.supervise.event_log import POLL, Event
from manta.launch.control.tail import Tail
from manta.trainer.metrics import Line, parse_lines
from manta.trainer.run_directory import RunDirectory

T = TypeVar("T")
Wait = Generator[None, None, T]
"""Goes on at every event of the run, until it has what it waits for."""


class Watch:
    """`lines` stand as they were written: of a step that was done again, two."""

    def __init__(self, home: RunDirectory) -> None:
        self.home = home
        self.events: list[Event] = []
        self.lines: list[Line] = []
        self._metrics = Tail(home.metrics_file)

    def take(self, event: Event) -> None:
        if event.kind != POLL:
            self.events.append(event)
        self.lines += parse_lines(self._metrics.lines().decode())

    @property
    def step(self) -> int:
        """The last that was done."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def furthest(self) -> int:
        """The last that was ever done."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def attempt(self) -> Event:
        """How the newest was started: with which ranks."""
        return [event for event in self.events if event.kind == "attempt-started"][-1]

    @property
    def nodes(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event.kind == "nodes-gathered"][-1].details["nodes"]

    def since(self, when: float, *kinds: str) -> Event | None:
        """The first event of these kinds that came later."""
        return next((event for event in self.events if event.kind in kinds and event.time > when), None)

    def beyond(self, attempt: int) -> Line | None:
        """The first line that a later attempt wrote."""
        return next((line for line in self.lines if line["attempt"] > attempt), None)


def wait(look: Callable[[], T | None], within: float) -> Wait[T]:
    """For what `look` finds. Raises TimeoutError where it finds nothing in so many seconds."""
    until = time.monotonic() + within
    while (found := look()) is None:
        if time.monotonic() > until:
            raise TimeoutError
        yield
    return found
