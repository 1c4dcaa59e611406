"""The hosts of a private Ray: starts one program (host.py) on each by a command such as ssh, restarts it, and ends it with the run."""

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
OBJECT_STORE_BYTES = 80_000_000  # nothing large passes through it; this is close to Ray's minimum
NVLINK_DOMAIN_LABEL = "manta-nvlink-domain"
MIN_BACKOFF = 2.0  # seconds before a host is started again; doubles
MAX_BACKOFF = 60.0
SHUTDOWN_TIMEOUT = 8.0  # seconds that the hosts have to end their processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """`reach`: the command that runs another one on the host, such as ("ssh", "node1"); empty for this machine.

    `has_shell`: whether that command passes its arguments to a shell, as ssh does. `address`: None if the host finds its own.
    `gpus`: None if Ray counts them.
    """

    name: str
    reach: tuple[str, ...] = ()
    has_shell: bool = False
    python: str = sys.executable
    address: str | None = None
    gpus: int | None = None

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs Python on the host."""
        python = [self.python, *arguments]
        return [*self.reach, shlex.join(python)] if self.has_shell else [*self.reach, *python]


class Hosts:
    """Context manager that keeps host.py running on every host.

    grace: seconds that a host waits, after a signal to end, for the ranks to save.
    """

    def __init__(self, hosts: Sequence[Host], gcs: str, token: Path, *, grace: float) -> None:
        self._hosts, self._gcs, self._token, self._grace = hosts, gcs, token, grace
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._supervise, args=(host,), name=host.name, daemon=True) for host in self._hosts]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing.set()
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _supervise(self, host: Host) -> None:
        backoff = MIN_BACKOFF
        while not self._closing.is_set():
            started = time.monotonic()
            code = self._run(host)
            if self._closing.is_set():
                return
            backoff = MIN_BACKOFF if time.monotonic() - started > MAX_BACKOFF else min(MAX_BACKOFF, 2 * backoff)
            log.warning("%s: ended with %s; starting it again in %.0f s", host.name, code, backoff)
            self._closing.wait(backoff)

    def _run(self, host: Host) -> int:
        """Run host.py on the host until it or the run ends; return its exit code."""
        settings = {
            "gcs": self._gcs,
            "token": self._token.read_text(),
            "address": host.address,
            "gpus": host.gpus,
            "grace": self._grace,
            "object_store_memory": OBJECT_STORE_BYTES,
            "nvlink_domain_label": NVLINK_DOMAIN_LABEL,
            "environment": {name: value for name, value in os.environ.items() if name.startswith("RAY_") and "AUTH" not in name},
        }
        with subprocess.Popen(host.command("-P", "-m", "manta.cluster.ray.host"), stdin=subprocess.PIPE, start_new_session=True) as process:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(settings).encode() + b"\n")
                process.stdin.flush()
                while process.poll() is None and not self._closing.wait(0.2):
                    pass
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SHUTDOWN_TIMEOUT)
            process.kill()
        return process.returncode
