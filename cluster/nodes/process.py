"""One process of the run: a spare while it waits on stdin for its place, a rank once it has it."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

LEASH = Path(__file__).with_name("die_with_parent.py")


class Process:
    """Starts `command` on a leash, in a session of its own, so that a Ctrl-C at the terminal does not reach it.

    To be made on the agent's event loop: its thread lives as long as the agent, and the leash is tied to that thread. `ended` is set
    when the process is gone, for one who waits for any of many.
    """

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], directory: Path, log: Path, ended: asyncio.Event) -> None:
        self.log = log
        self.code: int | None = None
        self.exited_at: float | None = None
        self._gone = asyncio.Event()
        self._ended = ended
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                [sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env=environment,
                start_new_session=True,
            )
        self._pidfd = os.pidfd_open(self.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self.code is None

    @property
    def state(self) -> str:
        """The kernel's one-letter state: T is stopped, D waits for a disk."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "X"

    def go(self, place: Mapping[str, str]) -> None:
        """Tell the spare which rank it is: one line of JSON, the environment variables it lacks."""
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._popen.stdin as stdin:  # dead already: its exit is reported like any other
            stdin.write(json.dumps(dict(place)).encode() + b"\n")

    def send(self, number: signal.Signals) -> None:
        if self.alive:
            self._popen.send_signal(number)

    async def kill(self) -> None:
        """Return when it is gone, and what it started with it."""
        if self.alive:
            os.killpg(self.pid, signal.SIGKILL)
            await self._gone.wait()

    def _reap(self) -> None:
        self.exited_at = time.time()
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # its children; before the wait, while the number can not be another's
        self.code = self._popen.wait()
        if self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.close()
        self._gone.set()
        self._ended.set()
