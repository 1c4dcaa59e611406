"""One host of a run's Ray: `python -P -m manta.cluster.ray.host`, started there by whatever reaches it (ssh, srun, a shell).

It is told on standard input, in one line of JSON, which Ray to join: so the token is in no argument and no environment. It runs a raylet,
and starts it anew when it ends (cut off from the others, a raylet gives up and does not come back). When standard input closes, whoever
started it is gone: it ends the raylet with all that this has started, and leaves nothing behind.
"""

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from manta.cluster.nodes.machine import address_towards, nvlink_island

TEMPORARY = Path("/tmp")  # noqa: S108  whatever TMPDIR says: Ray's socket paths must fit into 107 bytes
PREFIX = "manta-host-"
AGAIN = 1.0  # seconds before a raylet is started anew; doubles
LONGEST = 30.0
ENDING = 5.0  # seconds that a raylet has to end
PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    told = json.loads(sys.stdin.readline() or "{}")
    if not told:
        sys.stderr.write("manta.cluster.ray.host: got nothing on standard input, wants one line of JSON from `manta train`\n")
        return 2
    gone = threading.Event()

    def leave(_number: int, _frame: object) -> None:
        """Whoever stops all processes of a job stops the controller too: the ranks save first, and then it closes standard input."""
        patience = threading.Timer(told["grace"], gone.set)
        patience.daemon = True
        patience.start()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, leave)
    threading.Thread(target=_until_closed, args=(gone,), daemon=True).start()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what loses its parent becomes ours, and is found
    scratch = Path(tempfile.mkdtemp(prefix=PREFIX, dir=TEMPORARY))
    try:
        _keep_up(told, scratch, gone)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def _until_closed(gone: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    gone.set()


def _keep_up(told: Mapping[str, Any], scratch: Path, gone: threading.Event) -> None:
    token = scratch / f"token-{secrets.token_hex(4)}"
    with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123  pathlib takes no mode
        file.write(told["token"])
    wait, number = AGAIN, 0
    while not gone.is_set():
        number += 1
        begun = time.monotonic()
        folder = scratch / f"r{number}"
        folder.mkdir()
        _run(told, token, folder, gone)
        wait = AGAIN if time.monotonic() - begun > 60 else min(LONGEST, 2 * wait)
        gone.wait(wait)


def _run(told: Mapping[str, Any], token: Path, folder: Path, gone: threading.Event) -> None:
    """A raylet, until it ends or is to end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | told["environment"]
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    island = nvlink_island()
    own = told["address"] or address_towards(told["gcs"].rpartition(":")[0].strip("[]"))  # by which the others reach it
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", f"--address={told['gcs']}"]
    command += [
        f"--node-ip-address={own}",
        "--num-cpus=1",
        f"--temp-dir={folder}",
    ]
    command += [f"--object-store-memory={told['object_store_memory']}", "--include-log-monitor=false"]
    command += [] if told["gpus"] is None else [f"--num-gpus={told['gpus']}"]
    command += [f"--labels={told['island_label']}={island}"] if island else []
    log = folder / "ray.log"
    with log.open("wb") as output:
        raylet = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    while raylet.poll() is None and not gone.wait(0.1):
        _bury(all_but=raylet.pid)
    if raylet.poll() is not None:
        sys.stderr.write(f"{socket.gethostname()}: its raylet ended with {raylet.returncode}: {_last_line(log)}\n")
        sys.stderr.flush()
    raylet.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        raylet.wait(ENDING)
    raylet.kill()
    _end_orphans()


def _bury(*, all_but: int) -> None:
    """Takes note of orphans that have ended: else each stays a zombie for as long as this runs."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != all_but:
            os.waitpid(ended.si_pid, 0)


def _end_orphans() -> None:
    """Whatever a raylet has started, it is a child of this process by now: workers may take seconds to learn of its end."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=ENDING)


def _last_line(log: Path) -> str:
    return next(iter(reversed(log.read_text(errors="replace").strip().splitlines())), "it said nothing")


if __name__ == "__main__":
    sys.exit(main())
