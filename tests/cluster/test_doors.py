"""What a running cluster listens on, looked at from outside: what is ours on loopback alone, and Ray's shut to who has no token."""

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
from grpc_door import OK, UNAUTHENTICATED, UNIMPLEMENTED, methods, status
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
# Ray's doors by process: the services behind each. The controller is Ray's driver, an agent is its worker.
DOORS = {"controller": {WORKER}, "gcs_server": {HEAD}, "raylet": {NODE, OBJECTS}, "ray::NodeAgent": {WORKER}}
HTTP = "ray::RuntimeEnvAgent"
# What gRPC answers by itself: whether the process lives, what its services are called, how many calls there were and with whom.
OPEN = {"Health", "Channelz", "ServerReflection"}
HARMLESS = {  # a call that asks for next to nothing
    WORKER: "/ray.rpc.CoreWorkerService/NumPendingTasks",
    NODE: "/ray.rpc.NodeManagerService/GetSystemConfig",
    OBJECTS: "/ray.rpc.ObjectManagerService/Pull",
    HEAD: "/ray.rpc.NodeInfoGcsService/CheckAlive",
}


@dataclass(frozen=True)
class Door:
    process: str
    address: str
    port: int

    @property
    def is_on_loopback(self) -> bool:
        address = ipaddress.ip_address(self.address)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback

    @property
    def at(self) -> tuple[str, int]:
        return (self.address if self.is_on_loopback else "127.0.0.1"), self.port


@dataclass(frozen=True)
class Cluster:
    nodes: int
    processes: Counter[str]
    doors: list[Door]
    token_file: Path
    head: str

    @property
    def token(self) -> str:
        return f"Bearer {self.token_file.read_text()}"

    def of_ray(self) -> list[Door]:
        """Those that speak gRPC."""
        return [door for door in self.doors if door.process in DOORS]


def called(process: psutil.Process, controller: int, ranks: list[int]) -> str:
    arguments = process.cmdline()
    if process.pid == controller:
        return "controller"
    if "manta.trainer" in arguments:
        return "rank" if process.pid in ranks else "spare"
    if "manta.cluster.ray.host" in arguments:
        return "host"
    if "ray.scripts.scripts" in arguments:
        return "ray start"
    return Path(arguments[0]).name.split(".")[0]  # Ray's workers call themselves by what they do: ray::NodeAgent.poll


def belonging(mark: str) -> list[psutil.Process]:
    """All that came of what was started with a mark in its environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("DOORS") == mark:
                found += [process, *process.children(recursive=True)]
    return sorted(set(found), key=lambda process: process.pid)


def with_warm_spares(mark: str, controller: int, ranks: list[int]) -> list[tuple[psutil.Process, str]]:
    """All processes of a run and what they are, once as many spares as ranks have imported what they will need."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        named = [(process, called(process, controller, ranks)) for process in belonging(mark)]
        spares = [process for process, name in named if name == "spare"]
        before = [spare.cpu_times().user for spare in spares]
        time.sleep(0.5)
        if len(spares) == len(ranks) and min(before) > 1 and [spare.cpu_times().user for spare in spares] == before:
            return named
    raise AssertionError(f"no warm spares: {named}")


def listening(process: psutil.Process, name: str = "") -> list[Door]:
    """TCP that listens, and UDP that hears everyone."""
    ends = process.net_connections("inet")
    heard = [end for end in ends if end.status == psutil.CONN_LISTEN or (end.type == socket.SOCK_DGRAM and not end.raddr)]
    return [Door(name, end.laddr.ip, end.laddr.port) for end in heard]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def cluster(workspace, request):
    """Of a run with two ranks, on one node or on two, and with its spares."""
    run, nodes = f"doors {request.param}", request.param
    overrides = [f"run.dir={run}", "train.steps=100000", "cluster.hot_standby=true"]
    overrides += [f"cluster.nodes={nodes}", f"cluster.ranks_per_node={2 // nodes}"]
    with patch.dict(os.environ, DOORS=run), workspace.start("train", str(workspace.config_file), *overrides) as running:
        try:
            wait_for_step(workspace, run, 3, running, seconds=150)
            (started,) = [event for event in events(workspace, run) if event["event"] == "attempt-started"]
            ranks = [rank["pid"] for rank in started["ranks"]]
            named = with_warm_spares(run, running.pid, ranks)
            doors = [door for process, name in named for door in listening(process, name)]
            (gcs,) = [process for process, name in named if name == "gcs_server"]
            (head,) = [door for door in doors if door.process == "gcs_server"]
            yield Cluster(
                nodes=nodes,
                processes=Counter(name for _, name in named),
                doors=doors,
                token_file=Path(gcs.environ()["RAY_AUTH_TOKEN_PATH"]),
                head=f"127.0.0.{min(nodes, 2)}:{head.port}",
            )
        finally:
            running.send_signal(signal.SIGINT)
            running.communicate(timeout=60)


def test_what_listens_is_known_by_name_and_nothing_of_ours_beyond_the_loopback(cluster):
    everywhere = Counter(door.process for door in cluster.doors if not door.is_on_loopback)
    addresses = {name: {door.address for door in cluster.doors if door.process == name} for name in ("rank", HTTP)}
    if cluster.nodes == 1:
        assert everywhere == {}
        assert addresses == {"rank": {"127.0.0.1"}, HTTP: {"127.0.0.1"}}
    else:
        assert everywhere == {"controller": 1, "gcs_server": 1, "raylet": 2 * 3, "ray::NodeAgent": 2 * 2}
        assert addresses == {"rank": {"127.0.0.1", "127.0.0.3"}, HTTP: {"127.0.0.2", "127.0.0.3", "127.0.0.4"}}  # gloo, and where they meet
    names = {door.process for door in cluster.doors}
    assert names == {*DOORS, HTTP, "rank"}
    assert all(f"| `{name}` |" in DOCS.read_text() for name in names)
    assert cluster.processes["rank"] == cluster.processes["spare"] == 2


def test_a_client_without_the_token_is_turned_away_at_every_door_whatever_it_asks_for(cluster):
    assert cluster.of_ray()
    for door in cluster.of_ray():
        answers = defaultdict(set)
        for method in every_method():
            named = {"node_id": "0" * 56} if SYNCER in method else {}
            answers[status(door.at, method, **named)].add(method.split("/")[1].rpartition(".")[2])
        assert tuple(sorted(answers.pop(UNAUTHENTICATED))) in DOORS[door.process], door
        answers.pop(UNIMPLEMENTED)
        assert set().union(*answers.values()) <= OPEN, door


def test_the_same_call_is_let_in_with_the_token_and_not_with_another(cluster):
    met = Counter()
    for door in cluster.of_ray():
        for services in DOORS[door.process]:
            if status(door.at, HARMLESS[services]) != UNIMPLEMENTED:
                assert status(door.at, HARMLESS[services], authorization="Bearer " + "0" * 64) == UNAUTHENTICATED
                assert status(door.at, HARMLESS[services], authorization=cluster.token) == OK
                met[door.process] += 1
    assert met == Counter(door.process for door in cluster.of_ray())


def test_rays_own_client_is_let_in_by_the_head_with_the_token_alone(cluster):
    assert not is_open(cluster.head)
    ask = f"from ray._raylet import GcsClient; GcsClient(address={cluster.head!r}).internal_kv_get(b'x', None, timeout=5)"
    with_it = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster.token_file)}
    assert subprocess.run([sys.executable, "-P", "-c", ask], env=with_it, cwd="/", capture_output=True, check=False).returncode == 0


def test_http_is_shut_too(cluster):
    doors = [door for door in cluster.doors if door.process == HTTP]
    assert len(doors) == cluster.processes[HTTP] >= cluster.nodes
    for door in doors:
        for path in ("/get_runtime_envs_info", "/get_or_create_runtime_env", "/delete_runtime_env_if_possible", "/metrics"):
            assert answered(door, path, None) == 401
            assert answered(door, path, "Bearer " + "0" * 64) == 403
        assert answered(door, "/get_runtime_envs_info", cluster.token) == 200


def answered(door: Door, path: str, token: str | None) -> int:
    connection = http.client.HTTPConnection(*door.at, timeout=10)
    try:
        connection.request("POST", path, headers={} if token is None else {"Authorization": token})
        return connection.getresponse().status
    finally:
        connection.close()


@cache
def every_method() -> list[str]:
    """Less the one that answers for as long as one listens."""
    return sorted(method for method in methods() if not method.endswith("/Watch"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meet(address: str, port: int, seconds: float = 60, **environment: str) -> list[Door]:
    """What this rank listens on, once it has met the others anew."""
    dist.barrier()  # rank 0 takes the store with it when it goes
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port), **environment)
    World.from_environment().join(timeout=timedelta(seconds=seconds))
    together = torch.ones(1)
    dist.all_reduce(together)
    assert together.item() == dist.get_world_size()
    return listening(psutil.Process())


def test_ranks_meet_at_the_address_they_were_given_and_at_no_other():
    port = free_port()
    first, second = spmd(meet, 2, "127.0.0.5", port)
    assert Door("", "127.0.0.5", port) in first
    assert all(door.is_on_loopback for door in first + second)


def test_where_they_are_given_a_name_it_is_torch_that_listens_and_everywhere():
    """It shows too that the test above would see a door that is open."""
    port = free_port()
    first, _ = spmd(meet, 2, "localhost", port)
    assert [door.is_on_loopback for door in first if door.port == port] == [False]


def refused(address: str, port: int, **environment: str) -> str:
    with pytest.raises((OSError, dist.DistError)) as told:
        meet(address, port, seconds=1, **environment)
    return str(told.value)


def test_a_port_that_is_taken_and_an_address_that_is_elsewhere_are_told():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert spmd(refused, 1, "127.0.0.1", port)[0].startswith(f"MASTER_ADDR, MASTER_PORT: got 127.0.0.1, {port}, wants an address of")
    assert spmd(refused, 1, "192.0.2.1", port)[0].endswith("Cannot assign requested address")


def absent(rank: str) -> str:
    return refused("127.0.0.1", int(os.environ["MASTER_PORT"]), WORLD_SIZE="2", RANK=rank)


def test_a_peer_that_does_not_come_is_told():
    assert "1/2 clients joined" in spmd(absent, 1, "0")[0]
    assert "timed out" in spmd(absent, 1, "1")[0]
