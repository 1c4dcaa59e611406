"""What the outside asks of a run: signals are noted here, and acted upon by whoever looks next."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

LEAVE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Orders:
    """In force between enter and exit; the handlers that stood before are put back. `leave` is the first signal that said so,
    `at_once` that a Ctrl-C came after it.
    """

    def __init__(self) -> None:
        self.leave: signal.Signals | None = None
        self.at_once = False
        self._before: dict[signal.Signals, Any] = {}

    def note(self, number: int, frame: FrameType | None = None) -> None:
        del frame
        self.at_once = self.at_once or (self.leave is not None and number == signal.SIGINT)
        self.leave = self.leave or signal.Signals(number)

    def __enter__(self) -> Self:
        heard = [number for number in LEAVE if signal.getsignal(number) is not signal.SIG_IGN]  # nohup's wish stands
        self._before = {number: signal.signal(number, self.note) for number in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
