"""Progress of a long preparation, on stderr: a bar on a terminal, a few plain lines elsewhere."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_INTERVAL = 60.0  # seconds between plain lines, at most


def report(message: str) -> None:
    _console().print(message)


@contextmanager
def progress(title: str, total: int) -> Generator[Callable[[int], None]]:
    """Yield a function `advance(bytes)` that shows progress towards `total` bytes."""
    console = _console()
    if not console.is_terminal:
        yield _ProgressLines(console, title, max(total, 1)).advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.advance(task, amount)


class _ProgressLines:
    """Prints a line at each quarter, and each minute."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._done = self._quarters = 0
        self._started = self._printed = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        now, quarters = time.monotonic(), 4 * self._done // self._total
        if quarters == self._quarters and now - self._printed < _INTERVAL:
            return
        self._quarters, self._printed = quarters, now
        speed = self._done / max(now - self._started, 1e-6)
        remaining = int((self._total - self._done) / speed)
        share = f"{100 * self._done // self._total} % of {self._total / 1e6:.1f} MB"
        self._console.print(f"{self._title} {share}, {speed / 1e6:.1f} MB/s, {remaining // 60}:{remaining % 60:02d} left")


def _console() -> Console:
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
