"""Hosts that ssh reaches: what their file may say, and real sshds on loopback that a run goes over."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from manta.cluster.config import ClusterConfig
from manta.data.errors import InputError
from manta.launch.targets.ssh import ray_of
from manta.trainer.metrics import read_metrics

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


def test_a_file_names_hosts(tmp_path):
    file = tmp_path / "hosts.txt"
    file.write_text(
        "# ours\n\nme@127.0.0.1:2201 address=127.0.0.3 python=/opt/py thon\n".replace("py thon", "python") + "localhost # near\n"
    )
    ray = ray_of(str(file), ClusterConfig(nodes=2, grace=7, ssh={"options": ["-F", "mine"]}))
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


class Sshds:
    """Two of them, each on a port of its own, with keys of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, []
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it
        ports = [_free_port(), _free_port()]
        public = (folder / "host.pub").read_text().strip()
        (folder / "known").write_text("".join(f"[127.0.0.1]:{port} {public}\n" for port in ports))
        (folder / "config").write_text(f"Host *\n IdentityFile {folder}/user\n UserKnownHostsFile {folder}/known\n IdentitiesOnly yes\n")
        for number, port in enumerate(ports):
            settings = f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
            settings += f"PidFile {folder}/pid-{number}\nStrictModes no\nPermitRootLogin yes\nUsePAM no\nMaxStartups 20\n"
            (folder / f"sshd-{number}").write_text(settings)
            self.processes.append(subprocess.Popen([SSHD, "-D", "-e", "-f", folder / f"sshd-{number}"], stderr=subprocess.DEVNULL))
        (folder / "hosts").write_text("".join(f"127.0.0.1:{port} address=127.0.0.{3 + n}\n" for n, port in enumerate(ports)))

    def sessions(self, number: int) -> list[int]:
        """Those that an sshd serves."""
        listed = subprocess.run(["ps", "-wweo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.split()
        pairs = list(zip(listed[2::2], listed[3::2], strict=True))
        return [int(pid) for pid, parent in pairs if int(parent) == self.processes[number].pid]

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.wait(10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def sshds(tmp_path):
    if not Path(SSHD).exists() or shutil.which("ssh") is None:
        pytest.skip("no sshd on this machine: install openssh-server")
    sshds = Sshds(tmp_path)
    yield sshds
    sshds.close()


@pytest.mark.slow
def test_a_run_over_ssh_outlives_a_session_that_is_killed_and_leaves_nothing(case, sshds):
    """The host is reached for anew, and the run grows back; its losses are those of a run that nobody disturbed."""
    case.train("here", "train.steps=400", "cluster.nodes=2", "cluster.ranks_per_node=1")
    options = f'cluster.ssh.options=["-F", "{sshds.folder}/config"]'
    settings = ("train.steps=400", "cluster.nodes=2", "cluster.ranks_per_node=1", options)
    process = case.start("train", str(case.file), "run.dir=over ssh", "--on", f"ssh:{sshds.folder}/hosts", *settings)
    file = case.home / "over ssh/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not file.exists() or len(read_metrics(file)) < 30:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for session in sshds.sessions(1):
        os.kill(session, signal.SIGKILL)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert "lost" in told
    both = [{line["step"]: line for line in read_metrics(case.home / run / "metrics.jsonl")} for run in ("here", "over ssh")]
    assert both[0].keys() == both[1].keys()
    assert {line["world_size"] for line in both[1].values()} >= {2}
    assert [line["data/digest"] for line in both[1].values()] == [line["data/digest"] for line in both[0].values()]
    for step, line in both[1].items():
        assert line["train/loss"] == pytest.approx(both[0][step]["train/loss"], abs=1e-5)
    time.sleep(1)
    listed = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout
    assert "manta.cluster.host" not in listed
    assert str(case.home / "over ssh") not in listed
