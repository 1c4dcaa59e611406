"""What the outside asks of a run, by a signal, by a file or by the clock: noted here, and acted upon by whoever looks next."""

import math
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import psutil

LEAVE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
AT_ONCE = b"at once"


class Orders:
    """In force between enter and exit; the handlers that stood before are put back.

    `file`, where one is given, reaches the run from wherever its directory is seen: once it is there it asks as SIGTERM does, with
    AT_ONCE in it as two Ctrl-C do. One that an earlier run left unanswered is not for this one; what was answered is taken away.
    `seconds`: how long this process may run; then it is asked as USR1 does.
    """

    def __init__(self, file: Path | None = None, *, seconds: float = math.inf) -> None:
        self._file, self._end = file, psutil.Process().create_time() + seconds
        self._leave: signal.Signals | None = None
        self._at_once = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def leave(self) -> signal.Signals | None:
        """The first signal that said so."""
        self._look()
        return self._leave

    @property
    def at_once(self) -> bool:
        """Whether a Ctrl-C came after it, or what amounts to one."""
        self._look()
        return self._at_once

    def note(self, number: int, frame: FrameType | None = None) -> None:
        del frame
        self._at_once = self._at_once or (self._leave is not None and number == signal.SIGINT)
        self._leave = self._leave or signal.Signals(number)

    def _look(self) -> None:
        if self._leave is None and time.time() >= self._end:
            self._leave = signal.SIGUSR1
        if self._file is None:
            return
        with suppress(OSError):  # nobody asks; or a shared directory is out of sight for a moment, and is looked at again
            self._at_once = self._file.read_bytes().startswith(AT_ONCE) or self._at_once
            self._leave = self._leave or signal.SIGTERM

    def __enter__(self) -> Self:
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        heard = [number for number in LEAVE if signal.getsignal(number) is not signal.SIG_IGN]  # nohup's wish stands
        self._before = {number: signal.signal(number, self.note) for number in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._file is not None:
            with suppress(OSError):  # the next run takes it away, or does not begin
                self._file.unlink(missing_ok=True)
