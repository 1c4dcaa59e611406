"""A private Ray cluster for one run: its own processes, token and directory; nothing of it remains when the run ends.

Ray reads its environment when it is imported, so no module may import it before `private_ray` has been entered.
"""

import contextlib
import functools
import logging
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import time
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil

from manta.cluster.ray.errors import RayStartError
from manta.cluster.ray.hosts import OBJECT_STORE_BYTES
from manta.cluster.ray.temporary import PREFIX, make_scratch, object_store_folder, remove_stale_folders, token_file

HEALTH = {  # a lost node is noticed after about 10 s, not after a minute
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",  # seconds after which a node that lost its head gives up, with all its ranks
}
# Ray's autoscaler, log forwarder and web server: 1.2 s of processor time to start, 1.3 s to stop, and not used here.
UNUSED_SERVICES = ("start_monitor", "start_log_monitor", "start_api_server")
NODE_POLL_INTERVAL = 0.05  # seconds between two questions for the node that starts
NODE_WAIT = "RAY_raylet_start_wait_time_s"  # that Ray's code waits, uninterruptibly, for an answer
_processes: list[subprocess.Popen[bytes]] = []  # of the Ray that this process has started; there is one at most
_scratch: list[Path] = []  # and its directory


def gcs_address() -> str:
    """Return the address at which nodes join the Ray cluster that this process is connected to."""
    import ray

    return ray.get_runtime_context().gcs_address


@contextlib.contextmanager
def private_ray(address: str, *, cpus: int) -> Generator[Path]:
    """Start a Ray cluster that listens at `address`, with one agent per CPU; yield its private directory (0700), removed at the end.

    Raises RayStartError.
    """
    _check_address(address)
    remove_stale_folders()
    scratch = make_scratch(PREFIX)
    _processes.clear()
    _scratch[:] = [scratch]
    try:
        with token_file(scratch, _secret()) as token, _environment(token), quiet_ray():
            import ray

            del os.environ[NODE_WAIT]  # this process has read it; in others it would end workers that are ahead of their raylet
            try:
                try:
                    _start(scratch, address, cpus)
                except Exception as error:
                    last_line = (str(error).strip().splitlines() or [""])[-1]
                    reason = ended_process() or f"{type(error).__name__}: {last_line}"
                    raise RayStartError(start_failure(reason), is_transient=True) from error
                yield scratch
            finally:
                with quiet_warnings():
                    ray.shutdown()
                _kill_sessions()
                _processes.clear()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        remove_stale_folders()  # of hosts on this machine that were killed


@contextlib.contextmanager
def quiet_ray() -> Generator[None]:
    """Suppress what Ray prints to stdout, in colour, about a lost worker: the event log has it."""
    from ray._private import worker

    with _replaced(worker, _worker_logs_enabled=False):
        yield


def quiet_init() -> contextlib.AbstractContextManager[None]:
    """Suppress the warning that a thread sets no SIGTERM handler: the controller has its own."""
    from ray._private import worker

    return _replaced(worker.logger, disabled=True)


def quiet_warnings() -> contextlib.AbstractContextManager[Any]:
    return warnings.catch_warnings(action="ignore")


def _start(scratch: Path, address: str, cpus: int) -> None:
    import ray
    from ray._private import node, services

    original, get_node = services.ConsolePopen, services.get_node

    def detached(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        """Start a process of Ray in its own session.

        A hang-up, Ctrl-C or `timeout` signals the whole group of the terminal, and ranks without a raylet could not save.
        """
        process = original(*arguments, **options, start_new_session=True)
        _processes.append(process)
        return process

    def checked_get_node(*arguments: Any) -> dict[str, Any]:
        """Ray asks for its node until the raylet has registered it: with a pause, and not for half a minute after a process has ended."""
        time.sleep(NODE_POLL_INTERVAL)
        if ended := ended_process():
            raise ConnectionError(ended)
        return get_node(*arguments)

    with (
        contextlib.chdir(scratch),  # workers import from here first: in the user's directory a data.py would shadow ours
        _replaced(services, ConsolePopen=detached, get_node=checked_get_node, resolve_ip_for_localhost=str),
        _replaced(node.Node, **dict.fromkeys(UNUSED_SERVICES, _start_nothing)),
        quiet_warnings(),
        quiet_init(),
    ):
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=0,
            object_store_memory=OBJECT_STORE_BYTES,
            _plasma_directory=str(object_store_folder(scratch)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            _temp_dir=str(scratch / "ray"),  # Ray makes this directory readable by everyone; its parent stays private
            _node_ip_address=address,
        )


def _start_nothing(*_: object, **__: object) -> None:
    pass


def _kill_sessions() -> None:
    """Kill what remains of a Ray session: after a part of Ray was killed, its helpers and workers would linger for a minute."""
    sessions = {process.pid for process in _processes}  # each leads one
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) in sessions:
                os.kill(pid, signal.SIGKILL)


def ended_process() -> str | None:
    """Describe a process of the Ray head that has ended by itself; None if there is none."""
    for process in _processes:
        if (code := process.poll()) is not None:
            name = Path(os.fsdecode(process.args[0] if isinstance(process.args, list) else str(process.args))).name
            return f"Ray's {name} ended with {code}{_last_error(name)}"
    return None


def abandon() -> None:
    """End what this process has started of Ray, without Ray's own code, which hangs."""
    _kill_sessions()
    for scratch in _scratch:
        shutil.rmtree(scratch, ignore_errors=True)


def start_failure(reason: str) -> str:
    """Return in one line why Ray did not start, and what the user can do."""
    limits = [("processes (ulimit -u)", resource.RLIMIT_NPROC, 512), ("open files (ulimit -n)", resource.RLIMIT_NOFILE, 1024)]
    low = [f"{soft} {name}" for name, limit, enough in limits if 0 <= (soft := resource.getrlimit(limit)[0]) < enough]
    hint = f"raise the limits: only {' and '.join(low)} are allowed" if low else "check how many processes and how much memory are allowed"
    return f"expected a Ray that starts, got: {reason}. Run the command again; if it fails again, {hint}."


def _last_error(name: str) -> str:
    """Return the last error that a Ray process has logged."""
    for log in [log for scratch in _scratch for suffix in ("err", "out") for log in scratch.glob(f"ray/session_2*/logs/{name}.{suffix}")]:
        with contextlib.suppress(OSError):
            if errors := re.findall(
                r"^\[.* [EFC] \d+ \d+\] (?!\(\w+\) logging.cc)(.*)$", log.read_text(errors="replace", encoding="utf-8"), re.MULTILINE
            ):
                return f": {errors[-1]}"
    return ""


def _check_address(address: str) -> None:
    """Raises RayStartError if this machine cannot connect to itself at the address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.create_server((address, 0), family=family) as server:
            socket.create_connection(server.getsockname()[:2], timeout=5.0).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        is_loopback = address.startswith("127.")
        remedy = "Bring up the loopback interface: ip link set lo up" if is_loopback else "Check the address of this machine"
        expected = "an address at which this machine can connect to itself"
        raise RayStartError(f"{address}: expected {expected}, got {reason}. {remedy}.") from None


@contextlib.contextmanager
def _replaced(owner: object, **values: Any) -> Generator[None]:
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def _environment(token: Path) -> Generator[None]:
    """Replace all RAY_ variables (an address, token or hook of another Ray) by this Ray's settings."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith("RAY_")]:
        del os.environ[name]
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",  # agents request no GPU, yet their ranks must see all
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
        RAY_IGNORE_UNHANDLED_ERRORS="1",  # an agent's death is noticed by its sentinel
        RAY_USAGE_STATS_ENABLED="0",
        RAY_memory_monitor_refresh_ms="0",  # it would end healthy agents once 95% of the machine's memory is used, even by other programs
        RAY_worker_niceness="0",  # else ranks, which agents start, yield to every other process of the machine
        **HEALTH,
        **{NODE_WAIT: "0"},
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@functools.cache
def _secret() -> str:
    """Return this process's token: Ray reads it once and keeps it, even if it is started again with another one."""
    return secrets.token_hex(32)
