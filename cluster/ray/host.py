"""One host of a private Ray cluster: `python -P -m manta.cluster.ray.host`, started by hosts.py through ssh, srun or nothing.

It reads its settings from standard input, as one line of JSON, so that the token is in no argument and no environment variable. It runs a
raylet and restarts it when it ends: a raylet that is cut off from the head gives up for good. When standard input closes, the controller
is gone: it ends the raylet and every process that the raylet started.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from manta.cluster.machine import address_towards, nvlink_domain
from manta.cluster.protocol import ExitCode, deny_writes_by_others, raise_open_files_limit
from manta.cluster.ray.errors import RayStartError
from manta.cluster.ray.hosts import NVLINK_DOMAIN_LABEL, OBJECT_STORE_BYTES
from manta.cluster.ray.temporary import HOST_PREFIX, make_scratch, object_store_folder, remove_stale_folders, token_file

MIN_BACKOFF = 1.0  # seconds before a raylet is started again; doubles
MAX_BACKOFF = 30.0
SHUTDOWN_TIMEOUT = 5.0  # seconds that a raylet has to end
PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    deny_writes_by_others()
    raise_open_files_limit()
    settings = json.loads(sys.stdin.readline())
    closing = threading.Event()

    def close_later(_number: int, _frame: object) -> None:
        """A signal to all processes of a job also reaches the controller, which closes standard input once the ranks have saved."""
        timer = threading.Timer(settings["grace"], closing.set)
        timer.daemon = True
        timer.start()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, close_later)
    threading.Thread(target=_wait_for_end_of_input, args=(closing,), daemon=True).start()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans become children of this process, so that it finds them
    remove_stale_folders()
    try:
        scratch = make_scratch(HOST_PREFIX)
    except RayStartError as error:
        sys.stderr.write(f"{socket.gethostname()}: {error}\n")
        return ExitCode.FAILED
    try:
        _supervise(settings, scratch, closing)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return ExitCode.DONE


def _wait_for_end_of_input(closing: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    closing.set()


def _supervise(settings: Mapping[str, Any], scratch: Path, closing: threading.Event) -> None:
    with token_file(scratch, settings["token"]) as token:
        backoff, number = MIN_BACKOFF, 0
        while not closing.is_set():
            number += 1
            started = time.monotonic()
            directory = scratch / f"r{number}"
            directory.mkdir()
            _run_raylet(settings, token, directory, closing)
            backoff = MIN_BACKOFF if time.monotonic() - started > 60 else min(MAX_BACKOFF, 2 * backoff)
            closing.wait(backoff)


def _run_raylet(settings: Mapping[str, Any], token: Path, directory: Path, closing: threading.Event) -> None:
    """Run a raylet until it ends, or `closing` is set."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | settings["environment"]
    variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    command, log = _raylet_command(settings, directory), directory / "ray.log"
    with log.open("wb") as output:
        raylet = subprocess.Popen(
            command, cwd=directory, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    while raylet.poll() is None and not closing.wait(0.1):
        _reap_orphans(exclude=raylet.pid)
    if raylet.poll() is not None:
        sys.stderr.write(f"{socket.gethostname()}: its raylet ended with {raylet.returncode}: {_last_line(log)}\n")
        sys.stderr.flush()
    raylet.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        raylet.wait(SHUTDOWN_TIMEOUT)
    raylet.kill()
    _kill_orphans()


def _raylet_command(settings: Mapping[str, Any], directory: Path) -> list[str]:
    address = settings["address"] or address_towards(settings["gcs"].rpartition(":")[0].strip("[]"))  # by which other nodes reach it
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--num-cpus=1"]
    command += ["--include-log-monitor=false", f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={directory}"]
    command += [f"--plasma-directory={object_store_folder(directory)}"]
    command += [f"--address={settings['gcs']}", f"--node-ip-address={address}"]
    if settings["gpus"] is not None:
        command += [f"--num-gpus={settings['gpus']}"]
    if domain := nvlink_domain():
        command += [f"--labels={NVLINK_DOMAIN_LABEL}={domain}"]
    return command


def _reap_orphans(*, exclude: int) -> None:
    """Reap ended orphans: else they stay zombies while this process runs."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != exclude:
            os.waitpid(ended.si_pid, 0)


def _kill_orphans() -> None:
    """Kill what the raylet started, by now children of this process: workers may take seconds to notice that it ended."""
    orphans = psutil.Process().children(recursive=True)
    for process in orphans:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(orphans, timeout=SHUTDOWN_TIMEOUT)


def _last_line(log: Path) -> str:
    return next(iter(reversed(log.read_text(errors="replace", encoding="utf-8").strip().splitlines())), "no output")


if __name__ == "__main__":
    sys.exit(main())
