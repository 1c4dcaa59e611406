"""Nodes of real runs that freeze, die, join late or drain: each is a raylet with its own address."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from run_process import RunProcess, assert_nearly_same, exact_values, run_undisturbed, until

from manta.trainer.metrics import parse_lines

pytestmark = pytest.mark.slow
SETTINGS = (
    "schedule.shape=constant",
    "train.global_batch=12",
    "train.micro_batch=2",
    "evaluate.every_steps=100000",
    "evaluate.samples=1",
    "cluster.ranks_per_node=1",
)
ENDLESS = "train.steps=100000"
DRAIN = """
import sys
import time
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
preemption = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
gcs, node = sys.argv[1:]
accepted, reason = GcsClient(address=gcs).drain_node(node, preemption, "spot", int(1000 * (time.time() + 60)))
assert accepted, reason
"""


def raylet(run: RunProcess, address: str) -> int:
    return run.pid_of("/raylet --", f"--node_ip_address={address} ")


def processes_of_node(run: RunProcess, address: str) -> list[int]:
    """The program that starts its raylet, the raylet, its agents and its ranks."""
    host = psutil.Process(raylet(run, address)).parent()
    return [host.pid, *(child.pid for child in host.children(recursive=True))]


def signal_all(pids: list[int], number: signal.Signals) -> float:
    for pid in pids:
        os.kill(pid, number)
    return time.time()


def stops_with_the_same_losses(workspace, run: RunProcess) -> None:
    """Stop the run: no process remains, and its losses equal those of a run of the same length without faults."""
    run.process.send_signal(signal.SIGTERM)
    code, output = run.end(within=60)
    assert code == 75, output
    attempts = [line["attempt"] for line in parse_lines((run.directory / "metrics.jsonl").read_text())]
    assert attempts == sorted(attempts), "an older attempt kept writing"
    assert workspace.manta("checkpoint", "verify", run.directory.name).returncode == 0
    assert_nearly_same(
        run.lines(), run_undisturbed(workspace, f"{run.directory.name}, never", *SETTINGS, f"train.steps={len(run.lines())}")
    )


def test_a_run_continues_without_a_frozen_and_a_killed_node(workspace):
    limit = 4.0
    with RunProcess(workspace, "two nodes less", ENDLESS, *SETTINGS, "cluster.nodes=3", f"cluster.node_timeout={limit}") as run:
        run.steps(1, 15)
        frozen_node, old = processes_of_node(run, "127.0.0.5"), run.pids(1)[2]
        assert old in frozen_node
        frozen = signal_all(frozen_node, signal.SIGSTOP)
        lost = run.event("node-lost", 1)
        assert (lost["address"], lost["suspect"]) == ("127.0.0.5", True)
        assert lost["time"] - frozen < limit + 3
        run.steps(2, 10)
        signal_all(frozen_node, signal.SIGCONT)
        run.steps(2, 15)
        killed = signal_all(processes_of_node(run, "127.0.0.4")[1:], signal.SIGKILL)
        lost = run.event("node-lost", 2)
        assert (lost["address"], lost["time"] - killed < 3) == ("127.0.0.4", True)
        run.steps(3, 10)
        until(lambda: not Path(f"/proc/{old}").exists(), within=60)
        stops_with_the_same_losses(workspace, run)


def test_a_run_that_ends_removes_the_folder_of_a_killed_host_program(workspace):
    with RunProcess(workspace, "host killed", ENDLESS, *SETTINGS, "cluster.nodes=2") as run:
        run.steps(1, 5)
        commands = run.command_lines()
        raylet_pid = raylet(run, "127.0.0.4")
        folder = re.search(r"/\S+/manta-host-\w+", commands[raylet_pid])[0]
        (host,) = [each.pid for each in psutil.Process(raylet_pid).parents() if "manta.cluster.ray.host" in commands.get(each.pid, "")]
        os.kill(host, signal.SIGKILL)
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(60) == 75
        assert not Path(folder).exists()
        until(lambda: not run.processes(), within=60)


def test_a_run_grows_when_a_node_joins_late(workspace):
    with RunProcess(workspace, "late", ENDLESS, *SETTINGS, "cluster.nodes=1..2") as run:
        hosts = run.until(lambda: sorted(pid for pid, command in run.command_lines().items() if "manta.cluster.ray.host" in command)[1:2])
        late = [hosts[0], *(child.pid for child in psutil.Process(hosts[0]).children(recursive=True))]
        signal_all(late, signal.SIGSTOP)
        run.steps(1, 10)
        assert len(run.pids(1)) == 1
        signal_all(late, signal.SIGCONT)
        assert run.event("nodes-appeared", 1)["ranks"] == 2
        run.steps(2, 10)
        stops_with_the_same_losses(workspace, run)


def drain(run: RunProcess, node: str) -> None:
    """Drain a node as `ray drain-node` does, which would replace 127.0.0.1 by the outward address."""
    head = run.command_lines()[run.pid_of("/raylet --", "/tmp/manta-ray-")]
    gcs, folder = re.search(r"--gcs-address=(\S+)", head)[1], re.search(r"/tmp/manta-ray-\w+", head)[0]
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{folder}/token"}
    subprocess.run([sys.executable, "-P", "-c", DRAIN, gcs, node], env=environment, check=True)


def test_a_run_leaves_a_draining_node_without_recomputing_steps(workspace):
    with RunProcess(workspace, "drained", ENDLESS, *SETTINGS, "cluster.nodes=3", "checkpoint.every_steps=100000") as run:
        run.steps(1, 15)
        nodes = run.event("nodes-gathered", 0)["nodes"]
        when = time.time()
        drain(run, next(node["id"] for node in nodes if node["address"] == "127.0.0.4"))
        assert run.event("nodes-draining", 1)["time"] - when < 10
        assert run.event("attempt-stopped", 1)["outcome"] == "reallocated"
        assert [node["address"] for node in run.event("nodes-gathered", 1)["nodes"]] == ["127.0.0.3", "127.0.0.5"]
        run.steps(2, 10)
        assert not run.events("node-lost") + run.events("rank-failed"), "it does not count as a failure"
        stops_with_the_same_losses(workspace, run)
        steps = [line["step"] for line in parse_lines((run.directory / "metrics.jsonl").read_text())]
        assert steps == list(range(1, len(steps) + 1))


def test_a_run_saves_and_exits_with_75_when_its_own_node_drains(workspace):
    short = ("train.steps=200", "checkpoint.every_steps=100000")
    reference = exact_values(run_undisturbed(workspace, "never drained", *short))
    with RunProcess(workspace, "own node drained", *short) as run:
        run.steps(1, 15)
        drain(run, run.event("nodes-gathered", 0)["nodes"][0]["id"])
        code, output = run.end(within=60)
        assert code == 75, output
        assert ": draining " in output
    with RunProcess(workspace, "own node drained", "resume", "own node drained") as again:
        assert again.end()[0] == 0
        assert exact_values(again.lines()) == reference


def test_a_run_saves_after_stop_after_and_then_resumes(workspace):
    reference = exact_values(run_undisturbed(workspace, "limited, never", "train.steps=600", *SETTINGS))
    codes = []
    while {*codes} <= {75}:
        with RunProcess(workspace, "limited", "train.steps=600", *SETTINGS, "cluster.stop_after=0:00:20") as run:
            code, output = run.end(within=60)
            codes.append(code)
    assert codes[-1] == 0, output
    assert len(codes) > 1
    assert exact_values(run.lines()) == reference
