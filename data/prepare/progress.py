"""Progress of a long preparation, on stderr: a bar or a spinner on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Event, Thread

from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from manta.data.messages import MessageConsole

INTERVAL = 4.0  # seconds between lines: a silence of 5 looks like a hang

_TITLE = TextColumn("{task.description}", markup=False)
_BAR = (_TITLE, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
_SPINNER = (SpinnerColumn(), _TITLE, TimeElapsedColumn())


def report(message: str) -> None:
    MessageConsole(sys.stderr).message(message)


@contextmanager
def progress(title: str, total: int | None = None) -> Generator[Callable[[int], None]]:
    """Yield a function `advance(bytes)` that shows progress towards `total` bytes; if omitted, only the time is shown."""
    console = MessageConsole(sys.stderr)
    if console.is_terminal:
        with Progress(*(_SPINNER if total is None else _BAR), console=console, transient=total is None) as bar:
            task = bar.add_task(title, total=total)
            yield lambda amount: bar.advance(task, amount)
        return
    lines = _ProgressLines(console, title, total)
    thread = Thread(target=lines.print_regularly, daemon=True)
    thread.start()
    try:
        yield lines.advance
    finally:
        lines.ended.set()
        thread.join()


class _ProgressLines:
    """Prints a line at each quarter, and every few seconds."""

    def __init__(self, console: MessageConsole, title: str, total: int | None) -> None:
        self.ended = Event()
        self._console, self._title, self._total = console, title, total
        self._done = self._quarters = 0
        self._started = self._printed = time.monotonic()

    def print_regularly(self) -> None:
        while not self.ended.wait(max(0.0, self._printed + INTERVAL - time.monotonic())):
            if time.monotonic() - self._printed >= INTERVAL:
                self._print()

    def advance(self, amount: int) -> None:
        self._done += amount
        if self._total and (quarters := 4 * self._done // self._total) > self._quarters:
            self._quarters = quarters
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        seconds = self._printed - self._started
        if not self._total or not self._done:
            self._console.message(f"{self._title}, {seconds:.0f} s")
            return
        speed = self._done / max(seconds, 1e-6)
        remaining = int(max(0, self._total - self._done) / speed)
        share = f"{100 * self._done // self._total} % of {decimal(self._total)}"
        self._console.message(f"{self._title} {share}, {decimal(int(speed))}/s, {remaining // 60}:{remaining % 60:02d} left")
