"""A host loses its network link without a notice: the run continues without it, and uses it again once the link is restored."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import ssh_hosts
from network import Network
from run_process import RunProcess, assert_nearly_same, run_undisturbed, until

from manta.trainer.metrics import parse_lines

pytestmark = [pytest.mark.slow, pytest.mark.root]
LIMIT = 5.0
SETTINGS = ("schedule.shape=constant", "train.global_batch=12", "train.micro_batch=2", "evaluate.every_steps=100000", "evaluate.samples=1")


@pytest.fixture
def network():
    if os.geteuid() != 0:
        pytest.skip("network namespaces require root")
    if why := ssh_hosts.why_unavailable() or (None if shutil.which("ip") else "no ip on this machine: install iproute2"):
        pytest.skip(why)
    try:
        with Network(3) as network:
            yield network
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the kernel does not allow network namespaces: {error.stderr.decode().strip()}")


@pytest.fixture
def hosts(network, tmp_path):
    sshds = ssh_hosts.Sshds(tmp_path, [(network.address(n), 2200, network.enter(n), network.address(n)) for n in range(3)])
    yield sshds
    sshds.close()


def test_a_run_continues_while_its_first_host_is_cut_off(workspace, network, hosts):
    """The first host has rank 0, which saves. What it still does while it is cut off has no effect."""
    three = ("cluster.nodes=3", "cluster.ranks_per_node=1", f"cluster.node_timeout={LIMIT}")
    over_ssh = ("--on", f"ssh:{hosts.folder}/hosts", f'cluster.ssh.options=["-F", "{hosts.folder}/config"]')
    with RunProcess(workspace, "cut off", "train.steps=100000", *SETTINGS, *three, *over_ssh, inside=network.enter_hub()) as run:
        run.steps(1, 20)
        old = run.pids(1)[0]
        assert old in network.pids(network.hosts[0])
        cut = network.cut(0)
        lost = run.event("node-lost", within=60)
        assert (lost["address"], lost["suspect"]) == (network.address(0), True)
        assert lost["time"] - cut < LIMIT + 3
        assert run.event("first-step", 2)["time"] - cut < LIMIT + 15  # two ranks without a standby process import first
        assert len(run.pids(2)) == 2
        run.steps(2, 30)
        network.restore(0)
        run.event("nodes-appeared", 2, within=180)
        assert len(run.pids(3)) == 3
        run.steps(3, 20)
        until(lambda: not Path(f"/proc/{old}").exists(), within=90)
        os.killpg(run.process.pid, signal.SIGTERM)
        code, output = run.end(within=60)
        assert code == 75, output
        assert [event["attempt"] for event in run.events("attempt-started")] == [1, 2, 3]
        disturbed = run.lines()
        attempts = [line["attempt"] for line in parse_lines((run.directory / "metrics.jsonl").read_text())]
        assert attempts == sorted(attempts), "the host that was cut off kept writing"
        until(lambda: {name: pids for name in network.hosts if (pids := remaining(network, name, hosts))} == {}, within=20)
    assert workspace.manta("checkpoint", "verify", "cut off").returncode == 0
    assert_nearly_same(disturbed, run_undisturbed(workspace, "never cut off", f"train.steps={len(disturbed)}", *SETTINGS))


def remaining(network, name, hosts) -> list[int]:
    """The processes of a host without its sshd and the sshd's ending sessions."""
    own = {process.pid for process in hosts.processes}
    commands = {}
    for pid in network.pids(name):
        if pid not in own and (file := Path(f"/proc/{pid}/cmdline")).exists():
            commands[pid] = file.read_text()
    return [pid for pid, command in commands.items() if not command.startswith("sshd")]
