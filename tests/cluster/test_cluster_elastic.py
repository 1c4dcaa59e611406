"""Several nodes on one machine, each a raylet of its own at a loopback address of its own: lost, frozen, and come back."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from cluster_scene import Scene
from live_run import exactly, nearly, until

from manta.cluster.supervise.event_log import read_events
from manta.trainer.metrics import read_metrics


def raylet(scene, address):
    """The process id of the raylet at an address."""
    (pid,) = [pid for pid, command in scene.processes().items() if "/raylet --" in command and f"--node_ip_address={address} " in command]
    return pid


def of_node(scene, address):
    """All processes of a node, and which of them are ranks: what started its raylet, and all that came of this."""
    started = psutil.Process(raylet(scene, address)).parent()
    found = [started.pid, *(child.pid for child in started.children(recursive=True))]
    return found, [pid for pid in found if pid in scene.ranks()]


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """Three nodes of one rank; one's raylet is killed, and is started anew by the host."""
    plan = {"steps": 2000, "step_time": 0.05, "every": 1}
    cluster = {"nodes": 3, "ranks_per_node": 1, "max_restarts_without_progress": 5}
    scene = Scene(tmp_path_factory.mktemp("lost") / "run", plan, cluster=cluster, sizes=(1, 2, 3))
    scene.event("first-step", within=60)
    scene.killed = time.time()
    os.kill(raylet(scene, "127.0.0.4"), signal.SIGKILL)
    yield scene
    scene.close()


def test_a_run_goes_on_without_a_node_that_is_lost(lost):
    event = lost.event("node-lost")
    assert (event["address"], event["suspect"]) == ("127.0.0.4", True)
    assert event["time"] - lost.killed < 3
    assert [rank["node"] for rank in lost.event("attempt-started", 2)["ranks"]] == [0, 1]
    assert lost.event("first-step", 2)["time"] - lost.killed < 6
    assert lost.rank_environment(2, 1)["WORLD_SIZE"] == "2"


@pytest.mark.slow
def test_it_grows_when_the_node_comes_back(lost):
    appeared = lost.event("nodes-appeared", 2, within=60)
    assert appeared["ranks"] == 3
    assert lost.event("attempt-stopped", 2)["outcome"] == "regrouped"
    assert len(lost.event("attempt-started", 3)["ranks"]) == 3
    lost.event("first-step", 3)


def test_nothing_is_left_of_it(lost):
    lost.event("first-step", 2, within=60)
    lost.process.send_signal(signal.SIGTERM)
    assert lost.end() == 75


@pytest.mark.slow
def test_a_node_that_is_frozen_is_done_without_does_no_harm_when_it_thaws_and_is_trusted_again_in_time(tmp_path):
    limit = 3.0
    cluster = {"nodes": 3, "ranks_per_node": 1, "node_timeout": limit, "max_restarts_without_progress": 5}
    scene = Scene(tmp_path / "run", {"steps": 4000, "step_time": 0.05, "every": 1}, cluster=cluster, sizes=(1, 2, 3))
    try:
        scene.event("first-step", within=60)
        group, ranks = of_node(scene, "127.0.0.4")
        assert ranks
        for pid in group:
            os.kill(pid, signal.SIGSTOP)
        frozen = time.time()
        lost = scene.event("node-lost", within=60)
        assert (lost["address"], lost["suspect"]) == ("127.0.0.4", True)
        assert "has not answered for 3 s" in lost["message"]
        assert scene.event("first-step", 2, within=60)["time"] - frozen < limit + 4
        for pid in group:
            with contextlib.suppress(ProcessLookupError):  # its raylet, which thaws first, ends it
                os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + 60
        while set(ranks) & scene.ranks():
            assert time.monotonic() < deadline, "the old rank lives on"
            time.sleep(0.2)
        assert not [event for event in scene.events() if event["attempt"] > 2], "it was lost a moment ago"
        back = scene.event("nodes-appeared", 2, within=120)
        again = scene.event("nodes-gathered", 2)["nodes"]
        assert lost["machine"] not in [node["id"] for node in again] or back["time"] > lost["trusted_again"] > lost["time"] + 59
        assert len(scene.event("attempt-started", 3)["ranks"]) == 3
        scene.event("first-step", 3)
        scene.process.send_signal(signal.SIGTERM)
        assert scene.end() == 75
    finally:
        scene.close()


@pytest.mark.slow
def test_a_killed_controller_is_followed_by_another_and_frozen_ranks_that_thaw_save_nothing(workspace):
    """The second one's losses are those of a run that nobody disturbed, though the first one's ranks come back to life meanwhile."""
    steps = "train.steps=400"
    workspace.train("alone", steps)
    first = workspace.start("train", str(workspace.config_file), "run.dir=twice", steps)
    home = workspace.directory / "twice"
    until(lambda: (home / "metrics.jsonl").exists() and len(read_metrics(home / "metrics.jsonl")) > 20)
    old = pids(home)
    for pid in old:
        os.kill(pid, signal.SIGSTOP)
    first.kill()
    first.communicate()
    second = workspace.start("train", str(workspace.config_file), "run.dir=twice", steps)
    until(lambda: [event for event in read_events(home / "events.jsonl") if event["event"] == "first-step" and event["attempt"] == 2])
    for pid in old:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    _, told = second.communicate(timeout=200)
    assert second.returncode == 0, told
    started = [event for event in read_events(home / "events.jsonl") if event["event"] == "run-started"]
    assert [event["took_over"] for event in started] == [False, True]
    assert not [pid for pid in old if Path(f"/proc/{pid}").exists()]
    alone, twice = (exactly(read_metrics(workspace.directory / run / "metrics.jsonl")) for run in ("alone", "twice"))
    assert twice == alone
    assert json.loads((home / "checkpoints/fence.json").read_text())["attempt"] == 2
    assert workspace.manta("checkpoint", "verify", "twice").returncode == 0


def pids(home):
    """Of the newest attempt's ranks."""
    return [rank["pid"] for event in read_events(home / "events.jsonl") if event["event"] == "attempt-started" for rank in event["ranks"]]


@pytest.mark.slow
def test_a_run_whose_node_is_lost_reads_the_same_and_learns_the_same(workspace):
    """Two nodes, one, two: the losses stay within what adding in another order does."""
    settings = ("train.steps=400", "cluster.nodes=2", "cluster.ranks_per_node=1", "cluster.hot_standby=true")
    workspace.train("whole", *settings)
    process = workspace.start("train", str(workspace.config_file), "run.dir=lost", *settings)
    home = workspace.directory / "lost"
    until(lambda: (home / "metrics.jsonl").exists() and len(read_metrics(home / "metrics.jsonl")) > 20)
    os.kill(local_raylet("127.0.0.4"), signal.SIGKILL)
    _, told = process.communicate(timeout=250)
    assert process.returncode == 0, told
    assert "node 1 lost" in told
    whole, lost = (read_metrics(workspace.directory / run / "metrics.jsonl") for run in ("whole", "lost"))
    assert {line["world_size"] for line in lost} == {1, 2}
    nearly(lost, whole)


@pytest.mark.slow
def test_a_run_goes_on_with_smaller_tensors_where_too_few_ranks_are_left(workspace):
    """Each matrix shared by two nodes, then whole on one, then shared again."""
    settings = ("train.steps=300", "cluster.nodes=2", "cluster.ranks_per_node=1", "parallel.tensor=2", "parallel.zero=0")
    workspace.train("shared", *settings)
    process = workspace.start("train", str(workspace.config_file), "run.dir=halved", *settings, "cluster.hot_standby=true")
    home = workspace.directory / "halved"
    until(lambda: (home / "metrics.jsonl").exists() and len(read_metrics(home / "metrics.jsonl")) > 20)
    os.kill(local_raylet("127.0.0.4"), signal.SIGKILL)
    _, told = process.communicate(timeout=250)
    assert process.returncode == 0, told
    assert "1 rank on 127.0.0.3, parallel.tensor 2 -> 1, until there are more" in told
    shared, halved = (read_metrics(workspace.directory / run / "metrics.jsonl") for run in ("shared", "halved"))
    assert {line["layout"] for line in halved} == {"tensor 2, ZeRO-0", "ZeRO-0"}
    nearly(halved, shared)


def local_raylet(address):
    """The process id of the raylet of a rehearsal's node."""
    listed = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    (pid,) = [line.split()[0] for line in listed if "/raylet --" in line and f"--node_ip_address={address} " in line]
    return int(pid)
