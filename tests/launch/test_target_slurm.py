"""SLURM jobs: the submitted script, and a real SLURM that runs, warns, requeues and cancels it.

Write golden_slurm_job.sh with: MANTA_WRITE_GOLDEN=1 python -m pytest tests/launch/test_target_slurm.py -k golden
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster

from manta.cluster.config import ClusterConfig
from manta.cluster.supervise.event_log import read_events
from manta.data.errors import InputError
from manta.launch.config import load
from manta.launch.targets import slurm
from manta.trainer.metrics import read_metrics

GOLDEN = Path(__file__).with_name("golden_slurm_job.sh")
EXAMPLE = (
    "run.dir=/shared/my runs/first",
    'data.sources=["/shared/text/*.txt"]',
    "cluster.nodes=2..8",
    "cluster.slurm.partition=gpu",
    "cluster.slurm.account=research",
    "cluster.slurm.time=24:00:00",
    "cluster.slurm.gpus_per_node=8",
    'cluster.slurm.options=["--mem=0", "--exclude=n7"]',
    'cluster.slurm.modules=["cuda/13.0"]',
    "cluster.slurm.python=/opt/manta/bin/python",
)


SETUP = 'cluster.slurm.setup=["export NCCL_IB_HCA=mlx5", "ulimit -l unlimited"]'
CONTAINER = ("cluster.slurm.container=/images/manta.sqsh", 'cluster.slurm.mounts=["/shared", "/scratch:/tmp"]', SETUP)


def example(*overrides: str) -> str:
    return slurm.render(load(Path(__file__).parents[2] / "examples/gpt2-124m.yaml", [*EXAMPLE, *overrides]))


@pytest.mark.parametrize(("golden", "overrides"), [(GOLDEN, ()), (GOLDEN.with_name("golden_slurm_container_job.sh"), CONTAINER)])
def test_the_script_matches_the_golden_file(golden, overrides):
    if "MANTA_WRITE_GOLDEN" in os.environ:
        golden.write_text(example(*overrides))
    assert example(*overrides) == golden.read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine")
@pytest.mark.parametrize("overrides", [(), CONTAINER])
def test_shellcheck_accepts_the_script(overrides):
    result = subprocess.run(["shellcheck", "-"], input=example(*overrides), capture_output=True, text=True, check=False)
    assert result.stdout == ""
    wrong = example().replace("set -u\n", "set -u\necho $1\n")
    assert "SC2086" in subprocess.run(["shellcheck", "-"], input=wrong, capture_output=True, text=True, check=False).stdout


def test_a_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    settings = ("cluster.slurm.python=~/bin/python", "cluster.slurm.container=~/manta.sqsh", 'cluster.slurm.mounts=["~/data:~/in"]')
    script = example(*settings)
    assert "~" not in script
    assert "--container-image=/home/me/manta.sqsh --container-mounts=/home/me/data:/home/me/in" in script
    assert "/home/me/bin/python -P" in script


def test_settings_that_slurm_would_refuse_are_refused(workspace):
    for overrides, message in (
        (("cluster.slurm.warning=30",), "cluster.slurm.warning: expected more than cluster.grace_period (60 s), got 30 s"),
        (('cluster.slurm.mounts=["/data"]',), "cluster.slurm.mounts: expected none without a container, got some"),
        (("cluster.slurm.container=/a.sqsh",), "cluster.slurm.python: expected the interpreter in cluster.slurm.container, got nothing"),
        (("cluster.slurm.partition=a;b",), "cluster.slurm.partition"),
        (("cluster.slurm.time=soon",), "cluster.slurm.time"),
        (('cluster.slurm.options=["mem=0"]',), "expected options of sbatch"),
    ):
        result = workspace.manta("train", str(workspace.config_file), "run.dir=never", "--on", "slurm", "--dry-run", *overrides)
        assert result.returncode == 2
        assert message in result.stderr
        assert not (workspace.directory / "never").exists()


def test_a_time_is_not_read_as_a_number_to_base_60(workspace):
    printed = workspace.manta(
        "train", str(workspace.config_file), "run.dir=never", "--on", "slurm", "--dry-run", "cluster.slurm.time=24:00:00"
    )
    assert "#SBATCH --time=24:00:00\n" in printed.stdout
    assert printed.returncode == 0


def test_allocation_needs_a_slurm_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(InputError, match="expected SLURM_JOB_ID in the environment of a SLURM job, got none"):
        slurm.ray_of_allocation(ClusterConfig())


def test_the_head_address_is_not_loopback(monkeypatch):
    for address, is_used in (("10.1.2.3", True), ("127.0.1.1", False)):
        monkeypatch.setattr(socket, "gethostbyname", lambda _, address=address: address)
        assert (slurm._node_address() == address) == is_used


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if why := slurm_cluster.why_unavailable():
        pytest.skip(why)
    with slurm_cluster.SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def submit(workspace, cluster, run: str, *overrides: str, **environment: str) -> str:
    settings = ("cluster.nodes=2", "cluster.ranks_per_node=1", "cluster.grace_period=20", "cluster.slurm.time=10:00", *overrides)
    environment = {**cluster.environment, **environment}
    result = workspace.manta("train", str(workspace.config_file), f"run.dir={run}", "--on", "slurm", *settings, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def wait_for(condition, *, within: float = 120.0):
    deadline = time.monotonic() + within
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    return result


def steps(workspace, run: str) -> list[int]:
    file = workspace.directory / run / "metrics.jsonl"
    return [line["step"] for line in read_metrics(file)] if file.exists() else []


def processes_of(workspace, run: str) -> list[str]:
    """Living processes of a run: those with its directory in their arguments, and the hosts'."""
    lines = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if str(workspace.directory / run) in line or "manta.cluster.ray.host" in line]


@pytest.mark.slow
def test_a_warned_job_saves_is_requeued_and_finishes(workspace, cluster):
    """Its losses are those of an undisturbed run."""
    workspace.train("undisturbed", "train.steps=400", "cluster.nodes=2", "cluster.ranks_per_node=1")
    job = submit(workspace, cluster, "warned", "train.steps=400")
    wait_for(lambda: len(steps(workspace, "warned")) > 5)
    cluster.ask("scancel", "--signal=USR1", "--batch", job)
    wait_for(lambda: cluster.state(job) == "PENDING")
    events = [json.loads(line) for line in (workspace.directory / "warned/events.jsonl").read_text().splitlines()]
    assert (events[-1]["event"], events[-1]["exit_code"]) == ("run-ended", 75)
    wait_for(lambda: not processes_of(workspace, "warned"), within=20)

    def has_started() -> bool:  # scontrol may refuse this while the job is being requeued
        cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(5)  # each update makes the scheduler consider the job anew
        return cluster.state(job) != "PENDING"

    wait_for(has_started)
    wait_for(lambda: cluster.state(job) == "COMPLETED", within=240)
    both = [read_metrics(workspace.directory / run / "metrics.jsonl") for run in ("undisturbed", "warned")]
    assert [(line["step"], line["train/loss"], line["data/digest"]) for line in both[1]] == [
        (line["step"], line["train/loss"], line["data/digest"]) for line in both[0]
    ]
    assert {line["world_size"] for line in both[1]} == {2}
    assert not processes_of(workspace, "warned")


@pytest.mark.slow
def test_a_terminated_job_saves_and_is_not_requeued(workspace, cluster):
    job = submit(workspace, cluster, "cancelled", "train.steps=100000")
    wait_for(lambda: len(steps(workspace, "cancelled")) > 5)
    cluster.ask("scancel", "--signal=TERM", "--batch", job)
    wait_for(lambda: cluster.state(job) == "FAILED" and not processes_of(workspace, "cancelled"), within=60)
    events = [json.loads(line) for line in (workspace.directory / "cancelled/events.jsonl").read_text().splitlines()]
    assert (events[-1]["event"], events[-1]["exit_code"]) == ("run-ended", 75)
    assert list((workspace.directory / "cancelled/checkpoints").glob("step-*"))


def test_a_relay_ends_with_either_of_its_sides(tmp_path):
    """The controller's side is its standard input; the hosts' is the pipe."""
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-P", "-m", "manta.cluster.ray.relay", tmp_path / "pipe", "what", "srun", "would", "run"]
    for who, code in (("controller", 0), ("hosts", 1)):
        relay = subprocess.Popen(command, stdin=subprocess.PIPE)
        with (tmp_path / "pipe").open("rb") as hosts:
            relay.stdin.write(b"settings\n")
            relay.stdin.flush()
            assert hosts.readline() == b"settings\n"
            if who == "controller":
                relay.stdin.close()
                assert relay.wait(20) == code
                assert hosts.read() == b""
        assert relay.wait(20) == code
        relay.stdin.close()


SRUN = """#!/bin/bash
# As Pyxis does: --container-image makes a step see another system. This one has an interpreter that the host lacks, and no srun.
options=() inside=() enter='mount --bind {venv} {image} && mount --bind /dev/null /usr/bin/srun && exec "$0" "$@"'
while [[ "$1" = --* ]]; do
    case "$1" in
        --container-image=*) inside=(unshare --mount sh -c "$enter") ;;
        --container-mounts=*) ;;
        *) options+=("$1") ;;
    esac
    shift
done
exec /usr/bin/srun "${{options[@]}}" "${{inside[@]}}" "$@"
"""


@pytest.mark.slow
def test_a_job_in_a_container_needs_nothing_of_the_host(workspace, cluster, tmp_path):
    """Its controller runs in the container too, and saves when it is warned."""
    image, programs = tmp_path / "image", tmp_path / "bin"
    image.mkdir()
    programs.mkdir()
    (programs / "srun").write_text(SRUN.format(venv=Path(sys.prefix), image=image))
    (programs / "srun").chmod(0o755)
    settings = (f"cluster.slurm.python={image}/bin/python", "cluster.slurm.container=/images/manta.sqsh", "train.steps=100000")
    more = (f'cluster.slurm.mounts=["{workspace.directory.parent.parent}"]', "cluster.environment={OF_THE_CONFIG: 1}")
    setup = "cluster.slurm.setup=[export OF_THE_SCRIPT=2]"
    job = submit(workspace, cluster, "contained", *settings, *more, setup, PATH=f"{programs}:{os.environ['PATH']}")
    wait_for(lambda: len(steps(workspace, "contained")) > 5)
    events = read_events(workspace.directory / "contained/events.jsonl")
    (started,) = [event for event in events if event["event"] == "attempt-started"]
    for rank in started["ranks"]:
        environment = Path(f"/proc/{rank['pid']}/environ").read_text().split("\0")
        assert {"OF_THE_CONFIG=1", "OF_THE_SCRIPT=2"} <= set(environment)
        assert Path(f"/proc/{rank['pid']}/exe").resolve() == Path(sys.executable).resolve()
    assert not list(image.iterdir()), "the host does not see the interpreter"
    cluster.ask("scancel", "--signal=USR1", "--batch", job)
    wait_for(lambda: cluster.state(job) == "PENDING")
    last = read_events(workspace.directory / "contained/events.jsonl")[-1]
    assert (last["event"], last["exit_code"]) == ("run-ended", 75)
    wait_for(lambda: not processes_of(workspace, "contained"), within=20)
    assert not list((workspace.directory / "contained/slurm").glob("nodes-*"))
    listed = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout
    assert f"{cluster.folder}/spool-n1/job" not in listed, "the script has left no shell that waits for the pipe"
    cluster.ask("scancel", job)
