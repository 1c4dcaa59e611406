"""The ports that a running cluster listens on: manta's on the loopback only, and Ray's closed to clients without the token."""

import contextlib
import http.client
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch
import torch.distributed as dist
from grpc_probe import OK, UNAUTHENTICATED, UNIMPLEMENTED, methods, status
from runs import events, wait_for_step
from spmd import spmd

from manta.cluster.ray.runtime import is_open
from manta.trainer.dist.world import World

DOCS = Path(__file__).parents[2] / "docs/security.md"
WORKER, NODE, OBJECTS, SYNCER = ("CoreWorkerService",), ("NodeManagerService", "RaySyncer"), ("ObjectManagerService",), "RaySyncer"
HEAD = (
    *("ActorInfoGcsService", "AutoscalerStateService", "ControlPlanePubSubGcsService", "InternalKVGcsService", "JobInfoGcsService"),
    *("NodeInfoGcsService", "NodeResourceInfoGcsService", "ObservabilityPubSubService", "PlacementGroupInfoGcsService"),
    *("RayEventExportGcsService", "RaySyncer", "RuntimeEnvGcsService", "TaskInfoGcsService", "WorkerInfoGcsService"),
)
# Ray's ports by process: the services of each. The controller is Ray's driver, an agent is a worker.
PORTS = {"controller": {WORKER}, "gcs_server": {HEAD}, "raylet": {NODE, OBJECTS}, "ray::NodeAgent": {WORKER}}
HTTP = "ray::RuntimeEnvAgent"
# What gRPC itself answers: whether the process lives, the names of its services, the number of calls and their peers.
PUBLIC = {"Health", "Channelz", "ServerReflection"}
HARMLESS_CALLS = {
    WORKER: "/ray.rpc.CoreWorkerService/NumPendingTasks",
    NODE: "/ray.rpc.NodeManagerService/GetSystemConfig",
    OBJECTS: "/ray.rpc.ObjectManagerService/Pull",
    HEAD: "/ray.rpc.NodeInfoGcsService/CheckAlive",
}


@dataclass(frozen=True)
class Port:
    process: str
    address: str
    number: int

    @property
    def is_on_loopback(self) -> bool:
        address = ipaddress.ip_address(self.address)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback

    @property
    def endpoint(self) -> tuple[str, int]:
        return (self.address if self.is_on_loopback else "127.0.0.1"), self.number


@dataclass(frozen=True)
class Cluster:
    nodes: int
    processes: Counter[str]
    ports: list[Port]
    token_file: Path
    head: str

    @property
    def token(self) -> str:
        return f"Bearer {self.token_file.read_text()}"

    def grpc_ports(self) -> list[Port]:
        return [port for port in self.ports if port.process in PORTS]


def kind_of(process: psutil.Process, controller: int, ranks: list[int]) -> str:
    arguments = process.cmdline()
    if process.pid == controller:
        return "controller"
    if "manta.trainer" in arguments:
        return "rank" if process.pid in ranks else "standby"
    if "manta.cluster.ray.host" in arguments:
        return "host"
    if "ray.scripts.scripts" in arguments:
        return "ray start"
    return Path(arguments[0]).name.split(".")[0]  # Ray's workers rename themselves by the current call: ray::NodeAgent.poll


def processes_of(mark: str) -> list[psutil.Process]:
    """Every process with the mark in its environment, and their children."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("PORTS") == mark:
                processes += [process, *process.children(recursive=True)]
    return sorted(set(processes), key=lambda process: process.pid)


def processes_with_standby(mark: str, controller: int, ranks: list[int]) -> list[tuple[psutil.Process, str]]:
    """All processes of a run and their kinds, once there is a standby process for each rank and all have imported everything."""
    deadline, named = time.monotonic() + 90, []
    while time.monotonic() < deadline:
        try:
            named = [(process, kind_of(process, controller, ranks)) for process in processes_of(mark)]
            standby = [process for process, name in named if name == "standby"]
            before = [process.cpu_times().user for process in standby]
            time.sleep(0.5)
            if len(standby) == len(ranks) and min(before) > 1 and [process.cpu_times().user for process in standby] == before:
                return named
        except psutil.NoSuchProcess:  # it ended while it was listed
            continue
    raise AssertionError(f"no standby processes: {named}")


def listening(process: psutil.Process, name: str = "") -> list[Port]:
    """Return the TCP ports that listen, and the UDP ports without a peer."""
    connections = process.net_connections("inet")
    listening = [c for c in connections if c.status == psutil.CONN_LISTEN or (c.type == socket.SOCK_DGRAM and not c.raddr)]
    return [Port(name, connection.laddr.ip, connection.laddr.port) for connection in listening]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def cluster(workspace, request):
    """A run with two ranks, on one node or on two, and their standby processes."""
    run, nodes = f"ports {request.param}", request.param
    overrides = [f"run.dir={run}", "train.steps=100000", "cluster.hot_standby=true"]
    overrides += [f"cluster.nodes={nodes}", f"cluster.ranks_per_node={2 // nodes}"]
    with patch.dict(os.environ, PORTS=run), workspace.start("train", str(workspace.config_file), *overrides) as running:
        try:
            wait_for_step(workspace, run, 3, running, seconds=150)
            (started,) = [event for event in events(workspace, run) if event["event"] == "attempt-started"]
            ranks = [rank["pid"] for rank in started["ranks"]]
            named = processes_with_standby(run, running.pid, ranks)
            ports = [port for process, name in named for port in listening(process, name)]
            (gcs,) = [process for process, name in named if name == "gcs_server"]
            (head,) = [port for port in ports if port.process == "gcs_server"]
            yield Cluster(
                nodes=nodes,
                processes=Counter(name for _, name in named),
                ports=ports,
                token_file=Path(gcs.environ()["RAY_AUTH_TOKEN_PATH"]),
                head=f"127.0.0.{min(nodes, 2)}:{head.number}",
            )
        finally:
            running.send_signal(signal.SIGINT)
            running.communicate(timeout=60)


def test_only_documented_processes_listen_and_ranks_on_the_loopback(cluster):
    everywhere = Counter(port.process for port in cluster.ports if not port.is_on_loopback)
    addresses = {name: {port.address for port in cluster.ports if port.process == name} for name in ("rank", HTTP)}
    if cluster.nodes == 1:
        assert everywhere == {}
        assert addresses == {"rank": {"127.0.0.1"}, HTTP: {"127.0.0.1"}}
    else:
        assert everywhere == {"controller": 1, "gcs_server": 1, "raylet": 2 * 3, "ray::NodeAgent": 2 * 2}
        assert addresses == {"rank": {"127.0.0.1", "127.0.0.3"}, HTTP: {"127.0.0.2", "127.0.0.3", "127.0.0.4"}}  # gloo, and rank 0's store
    names = {port.process for port in cluster.ports}
    assert names == {*PORTS, HTTP, "rank"}
    assert all(f"| `{name}` |" in DOCS.read_text() for name in names)
    assert cluster.processes["rank"] == cluster.processes["standby"] == 2


def test_a_client_without_the_token_is_denied_every_method(cluster):
    assert cluster.grpc_ports()
    for port in cluster.grpc_ports():
        answers = defaultdict(set)
        for method in every_method():
            metadata = {"node_id": "0" * 56} if SYNCER in method else {}
            answers[status(port.endpoint, method, **metadata)].add(method.split("/")[1].rpartition(".")[2])
        assert tuple(sorted(answers.pop(UNAUTHENTICATED))) in PORTS[port.process], port
        answers.pop(UNIMPLEMENTED)
        assert set().union(*answers.values()) <= PUBLIC, port


def test_a_call_is_accepted_with_the_token_but_not_with_another(cluster):
    accepted = Counter()
    for port in cluster.grpc_ports():
        for services in PORTS[port.process]:
            if status(port.endpoint, HARMLESS_CALLS[services]) != UNIMPLEMENTED:
                assert status(port.endpoint, HARMLESS_CALLS[services], authorization="Bearer " + "0" * 64) == UNAUTHENTICATED
                assert status(port.endpoint, HARMLESS_CALLS[services], authorization=cluster.token) == OK
                accepted[port.process] += 1
    assert accepted == Counter(port.process for port in cluster.grpc_ports())


def test_rays_own_client_needs_the_token_too(cluster):
    assert not is_open(cluster.head)
    code = f"from ray._raylet import GcsClient; GcsClient(address={cluster.head!r}).internal_kv_get(b'x', None, timeout=5)"
    with_token = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster.token_file)}
    assert subprocess.run([sys.executable, "-P", "-c", code], env=with_token, cwd="/", capture_output=True, check=False).returncode == 0


def test_http_requires_the_token(cluster):
    ports = [port for port in cluster.ports if port.process == HTTP]
    assert len(ports) == cluster.processes[HTTP] >= cluster.nodes
    for port in ports:
        for path in ("/get_runtime_envs_info", "/get_or_create_runtime_env", "/delete_runtime_env_if_possible", "/metrics"):
            assert http_status(port, path, None) == 401
            assert http_status(port, path, "Bearer " + "0" * 64) == 403
        assert http_status(port, "/get_runtime_envs_info", cluster.token) == 200


def http_status(port: Port, path: str, token: str | None) -> int:
    connection = http.client.HTTPConnection(*port.endpoint, timeout=10)
    try:
        connection.request("POST", path, headers={} if token is None else {"Authorization": token})
        return connection.getresponse().status
    finally:
        connection.close()


@cache
def every_method() -> list[str]:
    """Without Watch, which answers for as long as a client listens."""
    return sorted(method for method in methods() if not method.endswith("/Watch"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join(address: str, port: int, seconds: float = 60, **environment: str) -> list[Port]:
    """Join the other ranks again; return the ports that this rank listens on."""
    dist.barrier()  # rank 0 takes the store with it when it goes
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port), **environment)
    World.from_environment().join(timeout=timedelta(seconds=seconds))
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size()
    return listening(psutil.Process())


def test_ranks_listen_on_the_given_address_only():
    number = free_port()
    first, second = spmd(join, 2, "127.0.0.5", number)
    assert Port("", "127.0.0.5", number) in first
    assert all(port.is_on_loopback for port in first + second)


def test_with_a_host_name_torch_listens_on_every_address():
    """The control of the test above: it would see an open port."""
    number = free_port()
    first, _ = spmd(join, 2, "localhost", number)
    assert [port.is_on_loopback for port in first if port.number == number] == [False]


def join_error(address: str, port: int, **environment: str) -> str:
    with pytest.raises((OSError, dist.DistError)) as error:
        join(address, port, seconds=1, **environment)
    return str(error.value)


def test_a_taken_port_and_a_foreign_address_are_reported():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = f"MASTER_ADDR, MASTER_PORT: expected an address of rank 0's machine and a free port there, got 127.0.0.1, {port}: "
        assert spmd(join_error, 1, "127.0.0.1", port)[0].startswith(message)
    assert spmd(join_error, 1, "192.0.2.1", port)[0].endswith("Cannot assign requested address")


def join_without_peer(rank: str) -> str:
    return join_error("127.0.0.1", int(os.environ["MASTER_PORT"]), WORLD_SIZE="2", RANK=rank)


def test_a_missing_peer_is_reported():
    assert "1/2 clients joined" in spmd(join_without_peer, 1, "0")[0]
    assert "timed out" in spmd(join_without_peer, 1, "1")[0]
