"""A private Ray for one run: its own processes, its own token, its own folder; nothing of it is left when the run ends.

Ray reads its environment when it is imported, so nothing here or above may import it before `connected` has been entered.
"""

import contextlib
import fcntl
import functools
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from manta.cluster.ray.hosts import OBJECT_STORE_BYTES, Host, Hosts

ALONE = "127.0.0.1"  # with this for its address Ray listens at no other; with any other it listens at all that the machine has
# Where this machine's own hosts join: they take 127.0.0.1 as a wish for the outward address, which a laptop loses when it changes networks.
LOOPBACK = "127.0.0.2"
TEMPORARY = Path("/tmp")  # noqa: S108  whatever TMPDIR says: Ray's socket paths must fit into 107 bytes
PREFIX = "manta-ray-"
GRACE = 5.0  # seconds: nobody but the controller tells this machine's own hosts to end
TOKEN = "token"  # noqa: S105  the name of its file
HEALTH = {  # a node that is gone is believed to be so after some 10 s, not after a minute
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",  # and one whose head is gone gives up, with all its ranks, after as long
}
# Ray's autoscaler, log forwarder and web server: 1.2 s of processor time to start, 1.3 s to stop, and nobody to talk to here.
NOT_NEEDED = ("start_monitor", "start_log_monitor", "start_api_server")


class Ray(Protocol):
    """Where nodes come from."""

    @property
    def on_one_node(self) -> bool:
        """Whether its one node is all there is: without it Ray has to be started anew."""
        ...

    def connected(self) -> contextlib.AbstractContextManager[Path | None]:
        """Ray can be spoken to while it lasts. Gives a private folder (0700) for agents; None where they have to make one."""
        ...


@dataclass(frozen=True, slots=True)
class LocalRay:
    """On this machine alone. More nodes than one are a rehearsal: processes of their own, each at a loopback address of its own."""

    nodes: int = 1

    @property
    def on_one_node(self) -> bool:
        return self.nodes == 1

    @contextlib.contextmanager
    def connected(self) -> Generator[Path]:
        if self.on_one_node:
            with _private_ray(ALONE, cpus=1) as scratch:
                yield scratch
            return
        hosts = [Host(name=f"127.0.0.{3 + node}", address=f"127.0.0.{3 + node}", gpus=0) for node in range(self.nodes)]
        with _private_ray(LOOPBACK, cpus=0) as scratch, Hosts(hosts, gcs_address(), scratch / TOKEN, grace=GRACE):
            yield scratch


@dataclass(frozen=True, slots=True)
class HostsRay:
    """On the hosts given, each started from here. `address`: this machine's, as hosts reach it."""

    hosts: tuple[Host, ...]
    address: str
    grace: float
    on_one_node: bool = False

    @contextlib.contextmanager
    def connected(self) -> Generator[None]:
        with _private_ray(self.address, cpus=0) as scratch, Hosts(self.hosts, gcs_address(), scratch / TOKEN, grace=self.grace):
            yield


@dataclass(frozen=True, slots=True)
class JoinedRay:
    """One that is there already, and stays. `address`: host:port of its head, or auto. This process has to be on one of its nodes."""

    address: str
    insecure: bool = False  # whether one that asks for no token will do
    on_one_node: bool = False

    @contextlib.contextmanager
    def connected(self) -> Generator[None]:
        """Raises OpenClusterError where anyone who reaches it may run code there, unless told that this is known."""
        if ":" in self.address:
            host, _, port = self.address.rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()  # Ray would try for minutes
            except OSError as error:
                raise NoClusterError(f"got {self.address}, wants a Ray that this machine is a node of: {error.strerror or error}") from None
        with _quiet_ray():
            import ray
            from ray.exceptions import AuthenticationError

            with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty), _sigterm_kept(), warnings.catch_warnings(action="ignore"):
                try:
                    ray.init(address=self.address, log_to_driver=False, logging_level=logging.CRITICAL)
                except (ConnectionError, AuthenticationError) as error:
                    raise NoClusterError(f"got {self.address}, wants a Ray that this machine is a node of: {_first_line(error)}") from None
            try:
                if not self.insecure and is_open(gcs_address()):
                    raise OpenClusterError(f"got {self.address}, wants one that asks for a token: start it with RAY_AUTH_MODE=token")
                yield
            finally:
                with warnings.catch_warnings(action="ignore"):
                    ray.shutdown()


class NoClusterError(RuntimeError):
    """There is no Ray to join, or it does not let us in."""


class OpenClusterError(NoClusterError):
    """Anyone may run code there."""


def is_open(gcs: str) -> bool:
    """Whether Ray's head answers who has no token. Asked by another process: Ray reads its settings once."""
    ask = f"from ray._raylet import GcsClient; GcsClient(address={gcs!r}).internal_kv_get(b'x', None, timeout=5)"
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}
    return subprocess.run([sys.executable, "-P", "-c", ask], env=without, capture_output=True, check=False, cwd="/").returncode == 0


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def gcs_address() -> str:
    """Where nodes join the Ray that this process has started."""
    import ray

    return ray.get_runtime_context().gcs_address


@contextlib.contextmanager
def _private_ray(address: str, *, cpus: int) -> Generator[Path]:
    """Start a Ray that listens at `address`, with room for so many agents; yields a private folder (0700) that is removed at the end."""
    _sweep()
    scratch = Path(tempfile.mkdtemp(prefix=PREFIX, dir=TEMPORARY))
    try:
        with _token(scratch) as token, _environment(token), _quiet_ray():
            import ray

            try:
                _start(scratch, address, cpus)
                yield scratch
            finally:
                sessions = _sessions()
                with warnings.catch_warnings(action="ignore"):
                    ray.shutdown()
                _end(sessions)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _quiet_ray() -> Generator[None]:
    """What Ray has to say about a lost worker goes to stdout, in colour; the journal says it better."""
    from ray._private import worker

    with _replaced(worker, "_worker_logs_enabled", False):
        yield


def _start(scratch: Path, address: str, cpus: int) -> None:
    import ray
    from ray._private import node, services

    # Ray's processes get a session of their own: a hang-up, Ctrl-C or `timeout` signals the whole group of the terminal, and ranks
    # whose raylet is gone could not save.
    detached = functools.partial(services.ConsolePopen, start_new_session=True)
    with contextlib.ExitStack() as during:
        during.enter_context(contextlib.chdir(scratch))  # workers import from here first; in the user's folder any data.py shadows ours
        during.enter_context(_sigterm_kept())
        during.enter_context(_replaced(services, "ConsolePopen", detached))
        during.enter_context(_replaced(services, "resolve_ip_for_localhost", _as_it_is))
        for helper in NOT_NEEDED:
            during.enter_context(_replaced(node.Node, helper, _start_nothing))
        during.enter_context(warnings.catch_warnings(action="ignore"))
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=0,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            _temp_dir=str(scratch / "ray"),  # Ray opens this folder to everyone; the one above stays shut
            _node_ip_address=address,
        )


def _sessions() -> set[int]:
    """Those of the Ray that was started here: each of its processes leads one."""
    from ray._private import worker

    started = getattr(worker, "_global_node", None)
    return {info.process.pid for infos in started.all_processes.values() for info in infos} if started else set()


def _end(sessions: set[int]) -> None:
    """What is left in them: where a part of Ray was killed, its helpers and workers would linger for a minute."""
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) in sessions:
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _sigterm_kept() -> Generator[None]:
    """Ray puts a SIGTERM handler of its own in place when it starts."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _start_nothing(*_: object, **__: object) -> None:
    pass


def _as_it_is(address: str) -> str:
    return address


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: Any) -> Generator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _environment(token: Path) -> Generator[None]:
    """Less any settings for other Rays (an address, a token, a hook), with those for this one."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith("RAY_")]:
        del os.environ[name]
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",  # agents ask for no GPU, yet their ranks must see all
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
        RAY_IGNORE_UNHANDLED_ERRORS="1",  # an agent's death is told by its sentinel
        RAY_USAGE_STATS_ENABLED="0",
        RAY_worker_niceness="0",  # else ranks, which agents start, give way to all else on the machine
        **HEALTH,
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@functools.cache
def _secret() -> str:
    """One for this process: Ray reads the token once and keeps it, whatever it is started with later."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def _token(scratch: Path) -> Generator[Path]:
    """Anyone who can reach Ray's ports could run code without it. Only its path is ever in an environment.

    It is locked while the run lasts: so the folder of a run that was killed can be told from one in use.
    """
    path = scratch / TOKEN
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123  pathlib takes no mode
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(_secret())
        file.flush()
        yield path


def _sweep() -> None:
    """Remove what killed runs left. A minute old at least: a younger one may not have its lock yet."""
    for token in TEMPORARY.glob(f"{PREFIX}*/token"):
        with contextlib.suppress(OSError), token.open() as file:  # held, another user's, or just gone
            if time.time() - os.fstat(file.fileno()).st_mtime > 60:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(token.parent, ignore_errors=True)
