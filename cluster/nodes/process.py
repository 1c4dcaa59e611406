"""One process of the run: a standby while it waits on stdin for its assignment, then a rank."""

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
from typing import BinaryIO, Literal

DIE_WITH_PARENT = Path(__file__).with_name("die_with_parent.py")


class Process:
    """Starts `command` so that it dies with this process, in its own session, out of reach of a Ctrl-C at the terminal.

    Make it on the agent's event loop: its thread lives as long as the agent. `any_ended` is set when the process has ended.
    """

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str], directory: Path, log: Path, any_ended: asyncio.Event
    ) -> None:
        self.log = log
        self.code: int | None = None
        self.exited_at: float | None = None
        self._ended = asyncio.Event()
        self._any_ended = any_ended
        tied = [sys.executable, "-I", "-S", str(DIE_WITH_PARENT), str(os.getpid()), *command]
        with open_log(log) as output:
            self._popen = subprocess.Popen(
                tied, cwd=directory, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._pidfd = os.pidfd_open(self.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def is_alive(self) -> bool:
        return self.code is None

    @property
    def state(self) -> str:
        """The kernel's one-letter state: T is stopped, D waits for a disk."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "X"

    def assign(self, environment: Mapping[str, str]) -> None:
        """Make the standby a rank: send it, as one line of JSON, the environment variables that it lacks."""
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._popen.stdin as stdin:  # if it is dead, its exit is reported like any other
            stdin.write(json.dumps(dict(environment)).encode() + b"\n")

    def send_signal(self, number: signal.Signals) -> None:
        if self.is_alive:
            self._popen.send_signal(number)

    async def kill(self) -> None:
        """Kill the process and its children; return when they are gone."""
        if self.is_alive:
            os.killpg(self.pid, signal.SIGKILL)
            await self._ended.wait()

    def _reap(self) -> None:
        self.exited_at = time.time()
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # its children; before the wait, while no other process can have its id
        self.code = self._popen.wait()
        if self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.close()
        self._ended.set()
        self._any_ended.set()


def open_log(log: Path, mode: Literal["wb", "ab"] = "wb") -> BinaryIO:
    """Open a process's log; on a full disk, its output is dropped."""
    try:
        return log.open(mode)
    except OSError:
        return Path(os.devnull).open("wb")
