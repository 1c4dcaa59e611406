"""Runs as jobs of SLURM's: the script as it is handed over, and a real SLURM that runs it, warns it, queues it again and cancels it.

The script is held against golden_slurm_job.sh; `python tests/test_target_slurm.py` writes that anew.
"""

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import slurm_cluster

from manta.cluster.config import ClusterConfig
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


def example() -> str:
    config = load(Path(__file__).parents[2] / "examples/gpt2-124m.yaml", EXAMPLE)
    return slurm.render(config, config.run.dir / "slurm/run.yaml")


def test_the_script_is_as_it_was():
    assert example() == GOLDEN.read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine")
def test_shellcheck_has_nothing_to_say():
    told = subprocess.run(["shellcheck", "-"], input=example(), capture_output=True, text=True, check=False)
    assert told.stdout == ""
    spoilt = example().replace("set -u\n", "set -u\necho $1\n")
    assert "SC2086" in subprocess.run(["shellcheck", "-"], input=spoilt, capture_output=True, text=True, check=False).stdout


def test_what_slurm_would_stumble_over_is_told(workspace):
    for told, key in (
        (("cluster.slurm.warning=30",), "cluster.slurm.warning: got 30 s, wants more than cluster.grace_period 60 s"),
        (('cluster.slurm.mounts=["/data"]',), "cluster.slurm.mounts: got some, and no container"),
        (("cluster.slurm.partition=a;b",), "cluster.slurm.partition"),
        (("cluster.slurm.time=soon",), "cluster.slurm.time"),
        (('cluster.slurm.options=["mem=0"]',), "expected options of sbatch"),
    ):
        done = workspace.manta("train", str(workspace.config_file), "run.dir=never", "--on", "slurm", "--dry-run", *told)
        assert done.returncode == 2
        assert key in done.stderr
        assert not (workspace.directory / "never").exists()


def test_a_time_is_a_time_and_no_number_to_the_base_of_sixty(workspace):
    printed = workspace.manta(
        "train", str(workspace.config_file), "run.dir=never", "--on", "slurm", "--dry-run", "cluster.slurm.time=24:00:00"
    )
    assert "#SBATCH --time=24:00:00\n" in printed.stdout
    assert printed.returncode == 0


def test_an_allocation_is_used_only_in_one(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(InputError, match="got no SLURM_JOB_ID, wants to be run in a job"):
        slurm.ray_of_allocation(ClusterConfig())


def test_the_head_is_where_other_nodes_reach_it(monkeypatch):
    for named, is_it in (("10.1.2.3", True), ("127.0.1.1", False)):
        monkeypatch.setattr(socket, "gethostbyname", lambda _, named=named: named)
        assert (slurm._own_address() == named) == is_it


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if why := slurm_cluster.why_unavailable():
        pytest.skip(why)
    with slurm_cluster.SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def submit(workspace, cluster, run: str, *overrides: str) -> str:
    settings = ("cluster.nodes=2", "cluster.ranks_per_node=1", "cluster.grace_period=20", "cluster.slurm.time=10:00", *overrides)
    done = workspace.manta("train", str(workspace.config_file), f"run.dir={run}", "--on", "slurm", *settings, **cluster.environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def until(what, *, within: float = 120.0):
    deadline = time.monotonic() + within
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    return found


def steps(workspace, run: str) -> list[int]:
    file = workspace.directory / run / "metrics.jsonl"
    return [line["step"] for line in read_metrics(file)] if file.exists() else []


def left_of(workspace, run: str) -> list[str]:
    """Processes of a run that still live: those with its directory in their arguments, and what hosts have started."""
    listed = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in listed if str(workspace.directory / run) in line or "manta.cluster.ray.host" in line]


@pytest.mark.slow
def test_a_job_that_is_warned_saves_is_queued_again_and_is_done(workspace, cluster):
    """Its losses are those of a run that nobody interrupted."""
    workspace.train("undisturbed", "train.steps=400", "cluster.nodes=2", "cluster.ranks_per_node=1")
    job = submit(workspace, cluster, "warned", "train.steps=400")
    until(lambda: len(steps(workspace, "warned")) > 5)
    cluster.ask("scancel", "--signal=USR1", "--batch", job)
    until(lambda: cluster.state(job) == "PENDING")
    events = [json.loads(line) for line in (workspace.directory / "warned/events.jsonl").read_text().splitlines()]
    assert (events[-1]["event"], events[-1]["exit_code"]) == ("run-ended", 75)
    until(lambda: not left_of(workspace, "warned"), within=20)

    def is_begun() -> bool:  # it may not be told so while it is being queued
        cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
        return cluster.state(job) != "PENDING"

    until(is_begun)
    until(lambda: cluster.state(job) == "COMPLETED", within=240)
    both = [read_metrics(workspace.directory / run / "metrics.jsonl") for run in ("undisturbed", "warned")]
    assert [(line["step"], line["train/loss"], line["data/digest"]) for line in both[1]] == [
        (line["step"], line["train/loss"], line["data/digest"]) for line in both[0]
    ]
    assert {line["world_size"] for line in both[1]} == {2}
    assert not left_of(workspace, "warned")


@pytest.mark.slow
def test_a_job_that_is_told_to_end_saves_and_stays_away(workspace, cluster):
    job = submit(workspace, cluster, "cancelled", "train.steps=100000")
    until(lambda: len(steps(workspace, "cancelled")) > 5)
    cluster.ask("scancel", "--signal=TERM", "--batch", job)
    until(lambda: cluster.state(job) == "FAILED" and not left_of(workspace, "cancelled"), within=60)
    events = [json.loads(line) for line in (workspace.directory / "cancelled/events.jsonl").read_text().splitlines()]
    assert (events[-1]["event"], events[-1]["exit_code"]) == ("run-ended", 75)
    assert list((workspace.directory / "cancelled/checkpoints").glob("step-*"))


if __name__ == "__main__":
    GOLDEN.write_text(example())
