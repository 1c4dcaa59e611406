"""Stop requests that reach a rank as signals."""

import signal
from types import FrameType


class StopRequest:
    """Records SIGTERM and the first SIGINT from its construction on. A second SIGINT raises KeyboardInterrupt.

    Ranks act on a request between steps, all together: a rank that exited alone, even while importing, would leave the others waiting.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._record)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # a supervisor may have blocked it until now

    @property
    def is_made(self) -> bool:
        return self.signal is not None

    def _record(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
