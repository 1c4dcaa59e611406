"""`--dry-run` on every target: what would run, by the config and what exists already. It starts, contacts and writes nothing."""

import subprocess

import pytest
from fuzz import manta

NOWHERE = ("run.dir=/nowhere/run", "data.directory=/nowhere", "data.sources=[/nowhere/a.txt]")
KUBERNETES = (
    "run.dir=/mnt/manta/run",
    "data.directory=/mnt/manta/corpora",
    "data.sources=[/mnt/manta/a.txt]",
    "cluster.kubernetes.image=registry.example.com/manta:1.0",
    "cluster.kubernetes.claim=data",
    "cluster.kubernetes.gpus=0",
    "data.cache.directory=/cache",
)


@pytest.fixture
def dry_run(workspace, monkeypatch):
    """Run a command with --dry-run; nothing may be started, and no file may be written."""

    def start(*_: object, **__: object) -> None:
        raise AssertionError("it starts a process")

    def files() -> list:
        return sorted((str(path), path.lstat().st_mtime_ns) for path in workspace.directory.rglob("*"))

    monkeypatch.chdir(workspace.directory)
    monkeypatch.setattr(subprocess.Popen, "__init__", start)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*arguments: str):
        before = files()
        outcome = manta(*arguments, "--dry-run")
        assert files() == before
        return outcome

    return run


@pytest.mark.parametrize(
    ("on", "overrides", "started"),
    [
        ("local", (), "would start Ray on this machine"),
        ("ssh:hosts", (), "'/opt/python -P -m manta.cluster.ray.host'"),
        ("auto", (), "would start nothing but ranks: it joins the Ray at auto"),
        ("10.255.255.1:6379", (), "would start nothing but ranks: it joins the Ray at 10.255.255.1:6379"),
        ("http://127.0.0.6:1", NOWHERE, "would start a job of 127.0.0.6: python -P -m manta.launch train run.yaml --on auto"),
        ("slurm", (), "would start sbatch, with this script:"),
        ("kubernetes", KUBERNETES, "would start kubectl apply, with this manifest:"),
    ],
)
def test_every_target_shows_layout_idle_ranks_batches_nodes_and_what_would_run(workspace, dry_run, on, overrides, started):
    (workspace.directory / "hosts").write_text("127.0.0.1 python=/opt/python\n")
    settings = ("run.dir=never", "cluster.ranks_per_node=3", "train.micro_batch=2", "cluster.environment={NCCL_DEBUG: WARN}", *overrides)
    outcome = dry_run("train", str(workspace.config_file), *settings, "--on", on)
    assert outcome.code == 0, outcome.stderr
    lines = (outcome.stderr if on in {"slurm", "kubernetes"} else outcome.stdout).splitlines()
    assert "1 of 3 ranks will be idle: train.global_batch 8 / train.micro_batch 2 divides evenly over 2 data ranks" in lines
    assert "2 ranks x micro batch 2 x accumulation 2 = 8 sequences of 32 tokens per step; fp32, data 2, ZeRO-1" in lines
    assert "nodes: 1, 3 ranks on each" in lines
    assert "environment of the ranks: NCCL_DEBUG=WARN" in lines
    assert started in "\n".join(lines)
    assert any(line.startswith("each rank: python -P -m manta.trainer ") for line in lines)
    if on == "slurm":
        assert outcome.stdout.startswith("#!/bin/bash\n")
    if on == "kubernetes":
        assert outcome.stdout.startswith("apiVersion: ")


def test_ranks_are_shown_for_usual_numbers_of_gpus_if_only_the_nodes_know_theirs(workspace, dry_run):
    lines = dry_run("train", str(workspace.config_file), "run.dir=never", "cluster.ranks_per_node=null", "--on", "auto").stdout.splitlines()
    assert "nodes: 1, one rank per GPU on each" in lines
    assert "with 1 GPU on each: 1 rank x micro batch 4 x accumulation 2 = 8 sequences of 32 tokens per step; fp32, ZeRO-1" in lines
    assert any(line.startswith("with 8 GPUs on each: 6 of 8 ranks will be idle") for line in lines)
    assert "data.live" in dry_run("train", str(workspace.config_file), "run.dir=never", "data.live=true").stdout


def test_a_run_that_exists_is_shown_with_its_step_and_corpus(workspace, dry_run, finished_run):
    home = workspace.directory / finished_run
    shown = dry_run("resume", finished_run, "train.steps=60").stdout
    assert f"run: {home}: resumes from step 40 of 60\n" in shown
    assert f"corpus: {workspace.directory}/corpora/" in shown
    assert f"run: {home}: already done: step 40; raise train.steps to continue\n" in dry_run("resume", finished_run).stdout


def test_what_could_not_start_is_refused(workspace, dry_run, finished_run):
    other = dry_run("train", str(workspace.config_file), f"run.dir={finished_run}", "optimizer.learning_rate=1")
    assert (other.code, "optimizer.learning_rate 0.001 -> 1.0" in other.stderr) == (2, True)
    absent = dry_run("train", str(workspace.config_file), "run.dir=never", "data.sources=[nowhere.txt]")
    assert (absent.code, "nowhere.txt" in absent.stderr, absent.stdout) == (2, True, "")
    nowhere = dry_run("train", str(workspace.config_file), "run.dir=never", "--on", "the moon")
    assert (nowhere.code, "--on: expected one of local, ssh:FILE" in nowhere.stderr) == (2, True)
