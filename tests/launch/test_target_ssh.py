"""Hosts that ssh reaches: what their file may say, and real sshds on loopback that a run goes over."""

import os
import signal
import subprocess
import time

import pytest
from ssh_hosts import Sshds, free_port, why_unavailable

from manta.cluster.config import ClusterConfig
from manta.data.errors import InputError
from manta.launch.targets.ssh import ray_of
from manta.trainer.metrics import read_metrics


def test_a_file_names_hosts(tmp_path):
    file = tmp_path / "hosts.txt"
    file.write_text(
        "# ours\n\nme@127.0.0.1:2201 address=127.0.0.3 python=/opt/py thon\n".replace("py thon", "python") + "localhost # near\n"
    )
    ray = ray_of(str(file), ClusterConfig(nodes=2, grace_period=7, ssh={"options": ["-F", "mine"]}))
    one, two = ray.hosts
    assert (one.name, one.address, one.python) == ("127.0.0.1", "127.0.0.3", "/opt/python")
    assert one.reach[-5:] == ("-F", "mine", "-p", "2201", "me@127.0.0.1")
    assert two.reach[-1] == "localhost"
    assert one.command("-m", "a b")[-1] == "/opt/python -m 'a b'", "a shell reads it there"
    assert (ray.address, ray.grace) == ("127.0.0.2", 7)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file or directory, wants a file with a host a line"),
        ("one\n", "got 1 hosts, wants the 2 of cluster.nodes"),
        ("one two\nthree\n", r":1: got 'one two', wants \[user@\]host"),
        ("one\ntwo adress=10.0.0.1\n", ":2: got 'two adress=10.0.0.1', wants"),
        ("no.such.host.invalid\ntwo\n", "got no.such.host.invalid, wants a host that can be found"),
    ],
)
def test_a_file_that_is_none_is_told(tmp_path, text, told):
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(InputError, match=told):
        ray_of(str(tmp_path / "hosts"), ClusterConfig(nodes=2))


@pytest.fixture
def sshds(tmp_path):
    if why := why_unavailable():
        pytest.skip(why)
    sshds = Sshds(tmp_path, [("127.0.0.1", free_port(), (), f"127.0.0.{3 + node}") for node in range(2)])
    yield sshds
    sshds.close()


@pytest.mark.slow
def test_a_run_over_ssh_outlives_a_session_that_is_killed_and_leaves_nothing(workspace, sshds):
    """The host is reached for anew, and the run grows back; its losses are those of a run that nobody disturbed."""
    workspace.train("beside ssh", "train.steps=400", "cluster.nodes=2", "cluster.ranks_per_node=1")
    options = f'cluster.ssh.options=["-F", "{sshds.folder}/config"]'
    settings = ("train.steps=400", "cluster.nodes=2", "cluster.ranks_per_node=1", options)
    process = workspace.start("train", str(workspace.config_file), "run.dir=over ssh", "--on", f"ssh:{sshds.folder}/hosts", *settings)
    file = workspace.directory / "over ssh/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not file.exists() or len(read_metrics(file)) < 30:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for session in sshds.sessions(1):
        os.kill(session, signal.SIGKILL)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert "lost" in told or "to be taken away" in told, "its raylet is told to end, and may be seen to before it does"
    both = [
        {line["step"]: line for line in read_metrics(workspace.directory / run / "metrics.jsonl")} for run in ("beside ssh", "over ssh")
    ]
    assert both[0].keys() == both[1].keys()
    assert {line["world_size"] for line in both[1].values()} >= {2}
    assert [line["data/digest"] for line in both[1].values()] == [line["data/digest"] for line in both[0].values()]
    for step, line in both[1].items():
        assert line["train/loss"] == pytest.approx(both[0][step]["train/loss"], abs=1e-5)
    time.sleep(1)
    listed = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout
    assert "manta.cluster.ray.host" not in listed
    assert str(workspace.directory / "over ssh") not in listed
