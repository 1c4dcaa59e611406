"""The Ray clusters that a run can use: a private one on this machine or on several hosts, or an existing one that it joins."""

import contextlib
import logging
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from manta.cluster.ray.errors import NoClusterError
from manta.cluster.ray.hosts import Host, running
from manta.cluster.ray.private_ray import gcs_address, private_ray, quiet_init, quiet_ray, quiet_warnings
from manta.cluster.ray.temporary import TOKEN

ONE_NODE_ADDRESS = "127.0.0.1"  # with this address Ray listens on it alone; with any other it listens on all of the machine's
# The head's address for nodes on this machine. They would replace 127.0.0.1 by the outward address, which a laptop loses on a new network.
LOOPBACK = "127.0.0.2"
LOCAL_GRACE = 5.0  # seconds: a local host gets no signal to end but the controller's


@dataclass(frozen=True, slots=True)
class LocalRay:
    """A private Ray cluster on this machine. Several nodes simulate a cluster: each has its own processes and its own loopback address."""

    nodes: int = 1

    @property
    def on_one_node(self) -> bool:
        """Whether the run's only node is also the head's: without it Ray must be started again."""
        return self.nodes == 1

    @contextlib.contextmanager
    def connected(self) -> Generator[Path]:
        """Connect to Ray. Yields a private directory (0700) for agents; the other kinds yield None, and agents make one."""
        if self.on_one_node:
            with private_ray(ONE_NODE_ADDRESS, cpus=1) as scratch:
                yield scratch
            return
        addresses = [f"127.0.0.{3 + node}" for node in range(self.nodes)]
        nodes = [Host(name=address, address=address, gpus=0) for address in addresses]
        with private_ray(LOOPBACK, cpus=0) as scratch, running(nodes, gcs_address(), scratch / TOKEN, grace=LOCAL_GRACE):
            yield scratch


@dataclass(frozen=True, slots=True)
class HostsRay:
    """A private Ray cluster on several hosts, each started from this machine. `address`: this machine's, by which hosts reach it."""

    hosts: tuple[Host, ...]
    address: str
    grace: float
    on_one_node: bool = False

    @contextlib.contextmanager
    def connected(self) -> Generator[None]:
        with private_ray(self.address, cpus=0) as scratch, running(self.hosts, gcs_address(), scratch / TOKEN, grace=self.grace):
            yield


@dataclass(frozen=True, slots=True)
class JoinedRay:
    """An existing Ray cluster that outlives the run. `address`: host:port of its head, or auto. This machine must be one of its nodes."""

    address: str
    insecure: bool = False  # whether to join one without a token
    on_one_node: bool = False

    @contextlib.contextmanager
    def connected(self) -> Generator[None]:
        """Raises NoClusterError if there is no such Ray, or it requires no token and `insecure` is not set."""
        if ":" in self.address:
            host, _, port = self.address.rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()  # Ray would try for minutes
            except OSError as error:
                raise self._unusable(error.strerror or str(error)) from None
        elif not os.environ.get("RAY_ADDRESS"):
            self._check_address_file()
        with quiet_ray():
            import ray
            from ray.exceptions import AuthenticationError

            with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty), quiet_init(), quiet_warnings():
                try:
                    ray.init(address=self.address, log_to_driver=False, logging_level=logging.CRITICAL)
                except (ConnectionError, AuthenticationError) as error:
                    raise self._unusable((str(error).strip().splitlines() or [type(error).__name__])[0]) from None
            try:
                if not self.insecure and is_open(gcs_address()):
                    raise NoClusterError(f"expected a Ray cluster with a token, got {self.address}. Start it with RAY_AUTH_MODE=token.")
                yield
            finally:
                with quiet_warnings():
                    ray.shutdown()

    def _check_address_file(self) -> None:
        """Raises NoClusterError if another user wrote the file in which Ray looks for the address: of his own cluster, or a named pipe."""
        temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108  as Ray does
        file = Path(temporary, "ray", "ray_current_cluster")
        with contextlib.suppress(FileNotFoundError):
            status = file.lstat()
            if status.st_uid not in {0, os.geteuid()} or not stat.S_ISREG(status.st_mode):
                raise self._unusable(f"{file} is another user's; name HOST:PORT")

    def _unusable(self, reason: str) -> NoClusterError:
        expected = "the address of a Ray cluster that this machine is a node of"
        return NoClusterError(f"expected {expected}, got {self.address} ({reason}). Check the address.")


Ray = LocalRay | HostsRay | JoinedRay
"""Where nodes come from."""


def is_open(gcs: str) -> bool:
    """Whether Ray's head answers a client without a token. Asked from another process: Ray reads its settings once."""
    code = f"from ray._raylet import GcsClient; GcsClient(address={gcs!r}).internal_kv_get(b'x', None, timeout=5)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}
    return subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, check=False, cwd="/").returncode == 0
