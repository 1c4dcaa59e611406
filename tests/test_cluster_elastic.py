"""Several nodes on one machine, each a raylet of its own at a loopback address of its own: lost, frozen, and come back."""

import os
import signal
import time
from pathlib import Path

import pytest
from cluster_scene import Scene


def raylet(scene, address):
    """The process id of the raylet at an address."""
    (pid,) = [pid for pid, command in scene.processes().items() if "/raylet --" in command and f"--node_ip_address={address} " in command]
    return pid


def of_node(scene, address):
    """All processes of a node: its raylet, what this started, and the ranks of its agent."""
    group = os.getpgid(raylet(scene, address))
    agents = [pid for pid, command in scene.processes().items() if command.startswith("ray::NodeAgent") and os.getpgid(pid) == group]
    ranks = [pid for pid in scene.ranks() if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) in agents]
    return [pid for pid in scene.processes() if os.getpgid(pid) == group], ranks


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """Three nodes of one rank; one's raylet is killed, and is started anew by the host."""
    plan = {"steps": 2000, "step_time": 0.05, "every": 1}
    cluster = {"nodes": 3, "ranks_per_node": 1, "restarts_without_progress": 5}
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
    assert lost.rank_environment(2, 1)["WORLD_SIZE"] == "2"
    assert lost.event("first-step", 2)["time"] - lost.killed < 6


def test_it_grows_when_the_node_comes_back(lost):
    appeared = lost.event("nodes-appeared", 2, within=60)
    assert appeared["ranks"] == 3
    assert lost.event("attempt-stopped", 2)["outcome"] == "regrouped"
    assert len(lost.event("attempt-started", 3)["ranks"]) == 3
    lost.event("first-step", 3)


def test_nothing_is_left_of_it(lost):
    lost.event("first-step", 3, within=60)
    lost.process.send_signal(signal.SIGTERM)
    assert lost.end() == 75
