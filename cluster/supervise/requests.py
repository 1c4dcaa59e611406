"""Requests to stop the run: by a signal, by a file or by a time limit."""

import math
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

import psutil

from manta.cluster.protocol import open_regular

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
AT_ONCE = b"at once"  # content of a stop file that asks to stop without saving


class StopRequests:
    """Context manager that collects stop requests, and restores the signal handlers when it exits.

    `file`: asks from any machine that sees the run directory. If it exists, it counts as SIGTERM; if it starts with AT_ONCE, as two Ctrl-C.
    A file that an earlier run left unanswered is removed at the start, an answered one at the end.
    `seconds`: how long this process may run; then a stop counts as requested by SIGUSR1.
    """

    def __init__(self, file: Path | None = None, *, seconds: float = math.inf) -> None:
        self._file, self._deadline = file, psutil.Process().create_time() + seconds
        self._signal: signal.Signals | None = None
        self._at_once = False
        self._handlers: dict[signal.Signals, Any] = {}

    @property
    def stop_signal(self) -> signal.Signals | None:
        """The first signal that asked to stop; None if there was none."""
        self._check()
        return self._signal

    @property
    def at_once(self) -> bool:
        """Whether a Ctrl-C followed the first request, or the file asks to stop without saving."""
        self._check()
        return self._at_once

    def install(self) -> None:
        """Set the handlers. Call it again once Ray has connected in a thread: its own handler prints a stack, and aborts after 3 s."""
        for number in self._handlers:
            signal.signal(number, self.record)

    def record(self, number: int, _frame: FrameType | None = None) -> None:
        signal.alarm(0)  # Ray's handler, if it is not replaced yet, has set the alarm that aborts
        self._at_once = self._at_once or (self._signal is not None and number == signal.SIGINT)
        self._signal = self._signal or signal.Signals(number)

    def _check(self) -> None:
        if self._signal is None and time.time() >= self._deadline:
            self._signal = signal.SIGUSR1
        if self._file is None:
            return
        with suppress(OSError):  # no such file; or a shared directory is unreachable for a moment, and the next check succeeds
            with open_regular(self._file) as file:
                self._at_once = file.read(len(AT_ONCE)) == AT_ONCE or self._at_once
            self._signal = self._signal or signal.SIGTERM

    def __enter__(self) -> Self:
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)
        handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
        self._handlers = {number: signal.getsignal(number) for number in handled}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._file is not None:
            with suppress(OSError):  # the next run removes it
                self._file.unlink(missing_ok=True)
