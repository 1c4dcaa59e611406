"""The hosts of a run's own Ray: one program on each (host.py), reached by a command, kept alive, and ended with the run."""

import contextlib
import json
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)
OBJECT_STORE_BYTES = 80_000_000  # nothing of size ever passes through it; this is near the least that Ray accepts
ISLAND = "manta-island"  # the label under which a node tells of its NVLink fabric
AGAIN = 2.0  # seconds before a host is reached for anew; doubles
LONGEST = 60.0
ENDING = 8.0  # seconds that the hosts have to end what they run


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """`reach` is the command that runs one there, as ("ssh", "node1"): nothing for this machine. `address`: None where it tells its own.
    `gpus`: None where Ray is to count them.
    """

    name: str
    reach: tuple[str, ...] = ()
    has_shell: bool = False  # whether a shell there reads what follows, as ssh has it
    python: str = sys.executable
    address: str | None = None
    gpus: int | None = None

    def command(self, *arguments: str) -> list[str]:
        """What runs Python there."""
        python = [self.python, *arguments]
        return [*self.reach, shlex.join(python)] if self.has_shell else [*self.reach, *python]


class Hosts:
    """In force between enter and exit. `grace`: seconds that one which is told to end waits for the run to leave."""

    def __init__(self, hosts: Sequence[Host], gcs: str, token: Path, *, grace: float) -> None:
        self._hosts, self._gcs, self._token, self._grace = hosts, gcs, token, grace
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._keep_up, args=(host,), name=host.name, daemon=True) for host in self._hosts]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending.set()
        until = time.monotonic() + ENDING
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _keep_up(self, host: Host) -> None:
        wait = AGAIN
        while not self._ending.is_set():
            begun = time.monotonic()
            code = self._run(host)
            if self._ending.is_set():
                return
            wait = AGAIN if time.monotonic() - begun > LONGEST else min(LONGEST, 2 * wait)
            log.warning("%s: ended with %s; it is reached for again in %.0f s", host.name, code, wait)
            self._ending.wait(wait)

    def _run(self, host: Host) -> int:
        """Runs the host's program until it ends, or the run does. Its exit code."""
        told = {
            "gcs": self._gcs,
            "token": self._token.read_text(),
            "address": host.address,
            "gpus": host.gpus,
            "grace": self._grace,
            "object_store_memory": OBJECT_STORE_BYTES,
            "island_label": ISLAND,
            "environment": {name: value for name, value in os.environ.items() if name.startswith("RAY_") and "AUTH" not in name},
        }
        with subprocess.Popen(host.command("-P", "-m", "manta.cluster.ray.host"), stdin=subprocess.PIPE, start_new_session=True) as process:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(told).encode() + b"\n")
                process.stdin.flush()
                while process.poll() is None and not self._ending.wait(0.2):
                    pass
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDING)
            process.kill()
        return process.returncode
