"""Hosts over ssh: the hosts file, and a run over real sshds on loopback."""

import os
import signal
import subprocess
import time

import pytest
from ssh_hosts import Sshds, free_port, why_unavailable

from manta.cluster.config import ClusterConfig
from manta.data.errors import InputError
from manta.launch.targets.ssh import ray_of_hosts
from manta.trainer.metrics import read_metrics


def test_the_hosts_file_sets_address_port_and_python(tmp_path):
    file = tmp_path / "hosts.txt"
    file.write_text("# ours\n\nme@127.0.0.1:2201 address=127.0.0.3 python=/opt/python\nlocalhost python=~/a/b* # near\n")
    ray = ray_of_hosts(str(file), ClusterConfig(nodes=2, grace_period=7, ssh={"options": ["-F", "mine"]}))
    one, two = ray.hosts
    assert (one.name, one.address, one.python) == ("127.0.0.1", "127.0.0.3", "/opt/python")
    assert one.reach[-5:] == ("-F", "mine", "-p", "2201", "me@127.0.0.1")
    assert two.reach[-1] == "localhost"
    assert one.command("-m", "a b")[-1] == "/opt/python -m 'a b'", "a shell reads it on the host"
    assert two.command("-m", "'~/a'")[-1] == """~/'a/b*' -m ''"'"'~/a'"'"''""", "the home directory there, which need not be the one here"
    assert (ray.address, ray.grace) == ("127.0.0.2", 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a file with one host per line, got: No such file or directory"),
        ("one\n", "expected 2 hosts, as in cluster.nodes, got 1"),
        ("one two\nthree\n", r":1: expected \[user@\]host.*, got 'one two'"),
        ("one\ntwo adress=10.0.0.1\n", ":2: expected .*, got 'two adress=10.0.0.1'"),
        ("no.such.host.invalid\ntwo\n", "expected a host that resolves, got no.such.host.invalid"),
    ],
)
def test_a_wrong_hosts_file_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(InputError, match=message):
        ray_of_hosts(str(tmp_path / "hosts"), ClusterConfig(nodes=2))


@pytest.fixture
def sshds(tmp_path):
    if why := why_unavailable():
        pytest.skip(why)
    sshds = Sshds(tmp_path, [("127.0.0.1", free_port(), (), f"127.0.0.{3 + node}") for node in range(2)])
    yield sshds
    sshds.close()


@pytest.mark.slow
def test_a_run_over_ssh_survives_a_killed_session(workspace, sshds):
    """The host is connected again, and the run grows back. Its losses are those of an undisturbed run, and no process remains."""
    workspace.train("without ssh", "train.steps=400", "cluster.nodes=2", "cluster.ranks_per_node=1")
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
    output = "".join(process.communicate(timeout=300))
    assert process.returncode == 0, output
    assert "lost" in output or "draining" in output, "a host that drains may be noticed before it is lost"
    both = [
        {line["step"]: line for line in read_metrics(workspace.directory / run / "metrics.jsonl")} for run in ("without ssh", "over ssh")
    ]
    assert both[0].keys() == both[1].keys()
    assert {line["world_size"] for line in both[1].values()} >= {2}
    assert [line["data/digest"] for line in both[1].values()] == [line["data/digest"] for line in both[0].values()]
    for step, line in both[1].items():
        assert line["train/loss"] == pytest.approx(both[0][step]["train/loss"], abs=1e-5)
    time.sleep(1)
    processes = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout
    assert "manta.cluster.ray.host" not in processes
    assert str(workspace.directory / "over ssh") not in processes
