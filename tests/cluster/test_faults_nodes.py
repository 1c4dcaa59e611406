"""Nodes of real runs that freeze, die whole, come late and are taken away with notice: each a raylet with an address of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from live_run import LiveRun, exactly, nearly, undisturbed, until

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
taken, why_not = GcsClient(address=gcs).drain_node(node, preemption, "spot", int(1000 * (time.time() + 60)))
assert taken, why_not
"""


def raylet(run: LiveRun, address: str) -> int:
    return run.pid_of("/raylet --", f"--node_ip_address={address} ")


def of_node(run: LiveRun, address: str) -> list[int]:
    """What starts its raylet, the raylet, its agent and its ranks."""
    started = psutil.Process(raylet(run, address)).parent()
    return [started.pid, *(child.pid for child in started.children(recursive=True))]


def signal_all(pids: list[int], number: signal.Signals) -> float:
    for pid in pids:
        os.kill(pid, number)
    return time.time()


def ended_as_if_undisturbed(workspace, run: LiveRun) -> None:
    """Told to leave, it has left nothing; its losses are those of a run of as many steps."""
    run.process.send_signal(signal.SIGTERM)
    code, told = run.end(within=60)
    assert code == 75, told
    attempts = [line["attempt"] for line in parse_lines((run.home / "metrics.jsonl").read_text())]
    assert attempts == sorted(attempts), "an older attempt went on writing"
    assert workspace.manta("checkpoint", "verify", run.home.name).returncode == 0
    nearly(run.lines(), undisturbed(workspace, f"{run.home.name}, never", *SETTINGS, f"train.steps={len(run.lines())}"))


def test_a_run_goes_on_without_a_node_that_freezes_and_one_that_dies_whole(workspace):
    limit = 4.0
    with LiveRun(workspace, "two nodes less", ENDLESS, *SETTINGS, "cluster.nodes=3", f"cluster.node_timeout={limit}") as run:
        run.steps(1, 15)
        group, old = of_node(run, "127.0.0.5"), run.pids(1)[2]
        assert old in group
        frozen = signal_all(group, signal.SIGSTOP)
        lost = run.event("node-lost", 1)
        assert (lost["address"], lost["suspect"]) == ("127.0.0.5", True)
        assert lost["time"] - frozen < limit + 3
        run.steps(2, 10)
        signal_all(group, signal.SIGCONT)
        run.steps(2, 15)
        killed = signal_all(of_node(run, "127.0.0.4")[1:], signal.SIGKILL)
        lost = run.event("node-lost", 2)
        assert (lost["address"], lost["time"] - killed < 3) == ("127.0.0.4", True)
        run.steps(3, 10)
        until(lambda: not Path(f"/proc/{old}").exists(), within=60)
        ended_as_if_undisturbed(workspace, run)


def test_a_run_grows_onto_a_node_that_comes_late(workspace):
    with LiveRun(workspace, "late", ENDLESS, *SETTINGS, "cluster.nodes=1..2") as run:
        hosts = run.until(lambda: sorted(pid for pid, command in run.whole_commands().items() if "manta.cluster.ray.host" in command)[1:2])
        late = [hosts[0], *(child.pid for child in psutil.Process(hosts[0]).children(recursive=True))]
        signal_all(late, signal.SIGSTOP)
        run.steps(1, 10)
        assert len(run.pids(1)) == 1
        signal_all(late, signal.SIGCONT)
        assert run.event("nodes-appeared", 1)["ranks"] == 2
        run.steps(2, 10)
        ended_as_if_undisturbed(workspace, run)


def drain(run: LiveRun, node: str) -> None:
    """As `ray drain-node` does, which takes 127.0.0.1 for the outward address."""
    head = run.whole_commands()[run.pid_of("/raylet --", "/tmp/manta-ray-")]
    gcs, folder = re.search(r"--gcs-address=(\S+)", head)[1], re.search(r"/tmp/manta-ray-\w+", head)[0]
    there = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{folder}/token"}
    subprocess.run([sys.executable, "-P", "-c", DRAIN, gcs, node], env=there, check=True)


def test_a_run_saves_and_leaves_a_node_that_is_to_be_taken_away_and_does_no_step_twice(workspace):
    with LiveRun(workspace, "given notice", ENDLESS, *SETTINGS, "cluster.nodes=3", "checkpoint.every_steps=100000") as run:
        run.steps(1, 15)
        nodes = run.event("nodes-gathered", 0)["nodes"]
        told = time.time()
        drain(run, next(node["id"] for node in nodes if node["address"] == "127.0.0.4"))
        assert run.event("nodes-draining", 1)["time"] - told < 10
        assert run.event("attempt-stopped", 1)["outcome"] == "regrouped"
        assert [node["address"] for node in run.event("nodes-gathered", 1)["nodes"]] == ["127.0.0.3", "127.0.0.5"]
        run.steps(2, 10)
        assert not run.events("node-lost") + run.events("rank-failed"), "it costs no try"
        ended_as_if_undisturbed(workspace, run)
        steps = [line["step"] for line in parse_lines((run.home / "metrics.jsonl").read_text())]
        assert steps == list(range(1, len(steps) + 1))


def test_a_run_whose_own_node_is_to_be_taken_away_saves_and_asks_to_be_run_again(workspace):
    short = ("train.steps=200", "checkpoint.every_steps=100000")
    whole = exactly(undisturbed(workspace, "taken away, never", *short))
    with LiveRun(workspace, "taken away", *short) as run:
        run.steps(1, 15)
        drain(run, run.event("nodes-gathered", 0)["nodes"][0]["id"])
        code, told = run.end(within=60)
        assert code == 75, told
        assert "to be taken away" in told
    with LiveRun(workspace, "taken away", "resume", "taken away") as again:
        assert again.end()[0] == 0
        assert exactly(again.lines()) == whole


def test_a_run_that_may_run_for_so_long_saves_when_it_has_and_goes_on_when_run_again(workspace):
    whole = exactly(undisturbed(workspace, "limited, never", "train.steps=300", *SETTINGS))
    codes = []
    while {*codes} <= {75}:
        with LiveRun(workspace, "limited", "train.steps=300", *SETTINGS, "cluster.stop_after=0:00:20") as run:
            code, told = run.end(within=60)
            codes.append(code)
    assert codes[-1] == 0, told
    assert len(codes) > 1
    assert exactly(run.lines()) == whole
