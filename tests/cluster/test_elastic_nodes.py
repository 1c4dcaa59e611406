"""Simulated nodes, each a raylet with its own loopback address: lost, frozen, and available again."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from fake_run import FakeRun
from run_process import assert_nearly_same, exact_values, until

from manta.cluster.supervise.event_log import read_events
from manta.trainer.metrics import read_metrics


def raylet(run, address):
    """The process id of the raylet at an address."""
    (pid,) = [pid for pid, command in run.processes().items() if "/raylet --" in command and f"--node_ip_address={address} " in command]
    return pid


def processes_of_node(run, address):
    """All processes of a node, the program that started its raylet first; and which of them are ranks."""
    host = psutil.Process(raylet(run, address)).parent()
    pids = [host.pid, *(child.pid for child in host.children(recursive=True))]
    return pids, [pid for pid in pids if pid in run.ranks()]


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """Three nodes of one rank. The raylet of one is killed, and restarted by its host program."""
    plan = {"steps": 2000, "step_time": 0.05, "every": 1}
    cluster = {"nodes": 3, "ranks_per_node": 1, "max_restarts_without_progress": 5}
    run = FakeRun(tmp_path_factory.mktemp("lost") / "run", plan, cluster=cluster, sizes=(1, 2, 3))
    run.event("first-step", within=60)
    run.killed = time.time()
    os.kill(raylet(run, "127.0.0.4"), signal.SIGKILL)
    yield run
    run.close()


def test_a_run_continues_without_a_lost_node(lost):
    event = lost.event("node-lost")
    assert (event["address"], event["suspect"]) == ("127.0.0.4", True)
    assert event["time"] - lost.killed < 3
    assert [rank["node"] for rank in lost.event("attempt-started", 2)["ranks"]] == [0, 1]
    assert lost.event("first-step", 2)["time"] - lost.killed < 6
    assert lost.rank_environment(2, 1)["WORLD_SIZE"] == "2"


@pytest.mark.slow
def test_a_run_grows_when_the_node_is_available_again(lost):
    appeared = lost.event("nodes-appeared", 2, within=60)
    assert appeared["ranks"] == 3
    assert lost.event("attempt-stopped", 2)["outcome"] == "reallocated"
    assert len(lost.event("attempt-started", 3)["ranks"]) == 3
    lost.event("first-step", 3)


def test_no_process_of_the_run_remains(lost):
    lost.event("first-step", 2, within=60)
    lost.process.send_signal(signal.SIGTERM)
    assert lost.end() == 75


@pytest.mark.slow
def test_a_frozen_node_is_excluded_and_used_again_later(tmp_path):
    limit = 3.0
    cluster = {"nodes": 3, "ranks_per_node": 1, "node_timeout": limit, "max_restarts_without_progress": 5}
    run = FakeRun(tmp_path / "run", {"steps": 4000, "step_time": 0.05, "every": 1}, cluster=cluster, sizes=(1, 2, 3))
    try:
        run.event("first-step", within=60)
        pids, ranks = processes_of_node(run, "127.0.0.4")
        assert ranks
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        frozen = time.time()
        lost = run.event("node-lost", within=60)
        assert (lost["address"], lost["suspect"]) == ("127.0.0.4", True)
        assert "has not answered for 3 s" in lost["message"]
        assert run.event("first-step", 2, within=60)["time"] - frozen < limit + 4
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # its raylet, which resumes first, ends it
                os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + 60
        while set(ranks) & run.ranks():
            assert time.monotonic() < deadline, "the old rank is still alive"
            time.sleep(0.2)
        assert not [event for event in run.events() if event["attempt"] > 2], "it was lost only a moment ago"
        back = run.event("nodes-appeared", 2, within=120)
        again = run.event("nodes-gathered", 2)["nodes"]
        assert lost["machine"] not in [node["id"] for node in again] or back["time"] > lost["trusted_again"] > lost["time"] + 59
        assert len(run.event("attempt-started", 3)["ranks"]) == 3
        run.event("first-step", 3)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 75
    finally:
        run.close()


@pytest.mark.slow
def test_frozen_ranks_of_a_killed_controller_save_nothing(workspace):
    """A second controller takes over; its losses equal those of a run without faults, though the first one's ranks resume meanwhile."""
    steps = "train.steps=400"
    workspace.train("reference", steps)
    first = workspace.start("train", str(workspace.config_file), "run.dir=twice", steps)
    home = workspace.directory / "twice"
    until(lambda: (home / "metrics.jsonl").exists() and len(read_metrics(home / "metrics.jsonl")) > 20)
    old = newest_pids(home)
    for pid in old:
        os.kill(pid, signal.SIGSTOP)
    first.kill()
    first.communicate()
    second = workspace.start("train", str(workspace.config_file), "run.dir=twice", steps)
    until(lambda: [event for event in read_events(home / "events.jsonl") if event["event"] == "first-step" and event["attempt"] == 2])
    for pid in old:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    output = "".join(second.communicate(timeout=200))
    assert second.returncode == 0, output
    started = [event for event in read_events(home / "events.jsonl") if event["event"] == "run-started"]
    assert [event["took_over"] for event in started] == [False, True]
    assert not [pid for pid in old if Path(f"/proc/{pid}").exists()]
    reference, twice = (exact_values(read_metrics(workspace.directory / run / "metrics.jsonl")) for run in ("reference", "twice"))
    assert twice == reference
    assert json.loads((home / "checkpoints/fence.json").read_text())["attempt"] == 2
    assert workspace.manta("checkpoint", "verify", "twice").returncode == 0


def newest_pids(home):
    """The process ids of the newest attempt's ranks."""
    return [rank["pid"] for event in read_events(home / "events.jsonl") if event["event"] == "attempt-started" for rank in event["ranks"]]


@pytest.mark.slow
def test_losses_stay_the_same_after_the_loss_of_a_node(workspace):
    """On two nodes, one, two. The samples are the same; losses differ by rounding, since fewer ranks sum in another order."""
    settings = ("train.steps=400", "cluster.nodes=2", "cluster.ranks_per_node=1", "cluster.hot_standby=true")
    workspace.train("two nodes", *settings)
    process = workspace.start("train", str(workspace.config_file), "run.dir=lost", *settings)
    home = workspace.directory / "lost"
    until(lambda: (home / "metrics.jsonl").exists() and len(read_metrics(home / "metrics.jsonl")) > 20)
    os.kill(local_raylet("127.0.0.4"), signal.SIGKILL)
    output = "".join(process.communicate(timeout=250))
    assert process.returncode == 0, output
    assert "node 1 lost" in output
    reference, lost = (read_metrics(workspace.directory / run / "metrics.jsonl") for run in ("two nodes", "lost"))
    assert {line["world_size"] for line in lost} == {1, 2}
    assert_nearly_same(lost, reference)


@pytest.mark.slow
def test_tensor_parallelism_shrinks_when_too_few_ranks_remain(workspace):
    """Each matrix is sharded over two nodes, then held by one, then sharded again."""
    settings = ("train.steps=300", "cluster.nodes=2", "cluster.ranks_per_node=1", "parallel.tensor=2", "parallel.zero=0")
    workspace.train("shared", *settings)
    process = workspace.start("train", str(workspace.config_file), "run.dir=halved", *settings, "cluster.hot_standby=true")
    home = workspace.directory / "halved"
    until(lambda: (home / "metrics.jsonl").exists() and len(read_metrics(home / "metrics.jsonl")) > 20)
    os.kill(local_raylet("127.0.0.4"), signal.SIGKILL)
    output = "".join(process.communicate(timeout=250))
    assert process.returncode == 0, output
    assert "1 rank on 127.0.0.3, parallel.tensor 2 -> 1, until more are available" in output
    shared, halved = (read_metrics(workspace.directory / run / "metrics.jsonl") for run in ("shared", "halved"))
    assert {line["layout"] for line in halved} == {"tensor 2, ZeRO-0", "ZeRO-0"}
    assert_nearly_same(halved, shared)


def local_raylet(address):
    """The process id of the raylet of a simulated node."""
    commands = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    (pid,) = [line.split()[0] for line in commands if "/raylet --" in line and f"--node_ip_address={address} " in line]
    return int(pid)
