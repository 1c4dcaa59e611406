"""A process beside the controller that follows the run, such as its trackers. However it ends or hangs, the run takes no notice."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from manta.cluster.nodes.process import DIE_WITH_PARENT, open_log

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds until it is started again after a failure; the pause doubles each time
END_TIMEOUT = 10.0  # seconds that it has to end after the run
POLL_INTERVAL = 0.02  # seconds


class Companion:
    """Starts it, restarts it when it fails, and ends it. Its standard input ends with the run; it dies with this process."""

    def __init__(self, arguments: Sequence[str], directory: Path) -> None:
        """arguments: of the Python interpreter; none: there is no such process."""
        self._arguments, self._directory = arguments, directory
        self.log = directory / "logs/companion.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._due, self._pause = time.monotonic(), FIRST_PAUSE
        self.starts = 0

    def check(self) -> str | None:
        """Start the process if it is due. Returns how it failed, once for each failure."""
        if not self._arguments:
            return None
        if self._process is None:
            return self._start() if time.monotonic() >= self._due else None
        if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        code = self._end()
        if code == 0:
            self._arguments = ()  # it is done
            return None
        self._delay()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def finish(self, is_impatient: Callable[[], bool]) -> None:
        """Let it end by itself, for a limited time."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        deadline = time.monotonic() + END_TIMEOUT
        while self._process.poll() is None and time.monotonic() < deadline and not is_impatient():
            time.sleep(POLL_INTERVAL)

    def close(self) -> None:
        if self._process is not None:
            self._end()

    def _start(self) -> str | None:
        tied = [sys.executable, "-I", "-S", str(DIE_WITH_PARENT), str(os.getpid()), sys.executable, *self._arguments]
        try:
            self.log.parent.mkdir(exist_ok=True)
            with open_log(self.log, "ab" if self.starts else "wb") as output:
                self._process = subprocess.Popen(
                    tied, cwd=self._directory, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
        except OSError as error:  # no process is left
            self._delay()
            return error.strerror
        self.starts += 1
        return None

    def _delay(self) -> None:
        self._due, self._pause = time.monotonic() + self._pause, min(2 * self._pause, LONGEST_PAUSE)

    def _end(self) -> int:
        """Kill it and its children, also those in other sessions, such as the service of W&B. Returns its exit code."""
        process, self._process = self._process, None
        assert process is not None
        assert process.stdin is not None
        children = list[psutil.Process]()
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        process.stdin.close()
        return process.wait()
