"""The hosts of a private Ray cluster: start one program (host.py) on each, by a command such as ssh; restart it; end it with the run."""

import contextlib
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)
OBJECT_STORE_BYTES = 80_000_000  # nothing large passes through it; this is close to Ray's minimum
NVLINK_DOMAIN_LABEL = "manta-nvlink-domain"
MIN_BACKOFF = 2.0  # seconds before a host is started again; doubles
MAX_BACKOFF = 60.0
SHUTDOWN_TIMEOUT = 8.0  # seconds that the hosts have to end their processes


class Host(NamedTuple):
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
        in_shell = re.sub(r"\A'~/", "~/'", shlex.join(python))  # the shell expands ~ only outside of quotes
        return [*self.reach, in_shell] if self.has_shell else [*self.reach, *python]


@contextlib.contextmanager
def running(hosts: Sequence[Host], gcs: str, token: Path, *, grace: float) -> Generator[None]:
    """Keep host.py running on every host.

    gcs: the address of Ray's head. grace: seconds that a host waits, after a signal to end, for the ranks to save.
    """
    environment = {name: value for name, value in os.environ.items() if name.startswith("RAY_") and "AUTH" not in name}
    settings = {"gcs": gcs, "token": token.read_text(encoding="utf-8"), "grace": grace, "environment": environment}
    closing = threading.Event()
    threads = [threading.Thread(target=_supervise, args=(host, settings, closing), name=host.name, daemon=True) for host in hosts]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        closing.set()
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _supervise(host: Host, settings: dict[str, object], closing: threading.Event) -> None:
    backoff = MIN_BACKOFF
    while not closing.is_set():
        started = time.monotonic()
        code = _run(host, settings, closing)
        if not closing.is_set():
            backoff = MIN_BACKOFF if time.monotonic() - started > MAX_BACKOFF else min(MAX_BACKOFF, 2 * backoff)
            log.warning("%s: ended with %s; starting it again in %.0f s", host.name, code, backoff)
            closing.wait(backoff)


def _run(host: Host, settings: dict[str, object], closing: threading.Event) -> int:
    """Run host.py on the host until it or the run ends; return its exit code."""
    with subprocess.Popen(host.command("-P", "-m", "manta.cluster.ray.host"), stdin=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({**settings, "address": host.address, "gpus": host.gpus}).encode() + b"\n")
            process.stdin.flush()
            while process.poll() is None and not closing.wait(0.2):
                pass
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SHUTDOWN_TIMEOUT)
        process.kill()
    return process.returncode
