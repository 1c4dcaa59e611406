"""Whether somebody has asked this rank to leave."""

import signal
from types import FrameType


class Notice:
    """From when it is made on, SIGTERM and the first SIGINT do nothing but to be remembered. Acted on between steps, on all ranks together:
    one that left alone, be it while it still imports, would leave the others waiting for it.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # a supervisor may have had it wait until now

    def _take(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
