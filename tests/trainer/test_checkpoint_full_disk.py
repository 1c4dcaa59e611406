"""Disks that are full or read-only: small tmpfs file systems that the test mounts, because root ignores permissions."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from mounts import fill, lift_quota, mount

from manta.cluster.supervise.event_log import read_events
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.errors import FencedError, SaveError
from manta.trainer.checkpoint.manifest import Progress
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.storage import open_backend
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.metrics import read_metrics

MIB, PAGE = 1 << 20, 4096


def tensors(step: int) -> dict[str, TensorViews]:
    return {"master/x": TensorViews.from_whole(torch.full((300, 1000), float(step)))}  # 1.2 MB


def progress(step: int) -> Progress:
    return Progress(step=step, samples_consumed=step, optimizer_steps=step)


FULL = r"rank 0: \S+/step-00000002: No space left on device: needs 1,200,\d+ bytes, and 880,640 were free\. Free some space, or lower"


def save(writer: CheckpointWriter, step: int, *, wait: bool) -> None:
    writer.save(tensors(step), progress(step), wait=wait)
    writer.finish()


@pytest.mark.parametrize("wait", [True, False], ids=["blocking", "asynchronous"])
def test_a_full_disk_is_reported_and_costs_no_checkpoint(disk, wait):
    writer = CheckpointWriter(open_backend(disk), identity={}, attempt=0, asynchronous=True)
    writer.set_fence()
    writer.save(tensors(1), progress(1))
    free = shutil.disk_usage(disk).free
    with pytest.raises(SaveError, match=FULL):
        save(writer, 2, wait=wait)
    assert shutil.disk_usage(disk).free == free, "the half-written checkpoint is deleted"
    assert catalog.newest_valid(open_backend(disk)).progress.step == 1
    assert mount("-o", "remount,size=8m", str(disk)).returncode == 0
    save(writer, 2, wait=wait)
    assert catalog.newest_valid(open_backend(disk)).progress.step == 2


@pytest.mark.parametrize("wait", [True, False], ids=["blocking", "asynchronous"])
def test_a_read_only_disk_is_reported_and_costs_no_checkpoint(disk, wait):
    writer = CheckpointWriter(open_backend(disk), identity={}, attempt=0, asynchronous=True)
    writer.set_fence()
    writer.save(tensors(1), progress(1))
    assert mount("-o", "remount,ro", str(disk)).returncode == 0
    with pytest.raises(SaveError, match=r"rank 0: \S+/\.step-00000002\S+: Read-only file system: needs 1,200,\d+ bytes, and"):
        save(writer, 2, wait=wait)
    assert catalog.newest_valid(open_backend(disk)).progress.step == 1
    assert mount("-o", "remount,rw", str(disk)).returncode == 0
    shutil.rmtree(disk / "step-00000001")
    save(writer, 3, wait=wait)
    assert catalog.newest_valid(open_backend(disk)).progress.step == 3


def test_a_quota_is_reported_and_costs_no_checkpoint(quota):
    writer = CheckpointWriter(open_backend(quota), identity={}, attempt=0, asynchronous=False)
    writer.set_fence()
    with pytest.raises(SaveError, match=r"rank 0: \S+/step-00000001: Disk quota exceeded: needs 1,200,\d+ bytes\. Free some space"):
        save(writer, 1, wait=True)
    lift_quota(quota)
    save(writer, 2, wait=True)
    assert catalog.newest_valid(open_backend(quota)).progress.step == 2


def test_space_of_a_dead_attempts_partial_checkpoint_is_freed_first(disk):
    """Otherwise the next attempt could not set its fence."""
    dead = CheckpointWriter(open_backend(disk), identity={}, attempt=1)
    dead.set_fence()
    dead.save(tensors(1), progress(1))
    half = disk / ".step-00000002.a0001-00000000.partial"
    half.mkdir()
    fill(half / "rank-0000.safetensors", leave=0)
    live = CheckpointWriter(open_backend(disk), identity={}, attempt=2)
    live.set_fence()
    assert not list(disk.glob(".*"))
    assert open_backend(disk).is_fence_held_by(live._token)
    assert not open_backend(disk).is_fence_held_by(dead._token)
    assert mount("-o", "remount,size=8m", str(disk)).returncode == 0
    with pytest.raises(FencedError):
        dead.save(tensors(2), progress(2))
    assert catalog.newest_valid(open_backend(disk)).progress.step == 1


def test_an_attempt_that_cannot_set_its_fence_says_what_to_do(disk):
    writer = CheckpointWriter(open_backend(disk), identity={}, attempt=1)
    writer.save(tensors(1), progress(1))
    (disk / "fence.json").unlink(missing_ok=True)
    fill(disk / "filler", leave=0)
    with pytest.raises(SaveError, match=rf"{disk}: No space left on device\. Free some space"):
        writer.set_fence()
    assert mount("-o", "remount,ro", str(disk)).returncode == 0
    with pytest.raises(SaveError, match=rf"{disk}/\.fence\.json\.\d+\.tmp: Read-only file system"):
        writer.set_fence()
    assert catalog.newest_valid(open_backend(disk)).progress.step == 1


@pytest.mark.parametrize("short", [0, 1, 2], ids=["no space for latest", "nor for the manifest", "nor for the tensors"])
def test_a_checkpoint_without_enough_space_is_complete_or_absent(disk, short, caplog):
    writer = CheckpointWriter(open_backend(disk), identity={}, attempt=1)
    writer.set_fence()
    assert mount("-o", "remount,size=8m", str(disk)).returncode == 0
    before = shutil.disk_usage(disk).free
    writer.save(tensors(1), progress(1))
    size = before - shutil.disk_usage(disk).free - PAGE  # `latest` was written, too
    fill(disk / "filler", leave=size - short * PAGE)
    if short == 0:
        writer.save(tensors(2), progress(2))
        assert re.search(r"latest\S*: No space left on device; step-00000002 is saved nevertheless", caplog.text)
    else:
        with pytest.raises(SaveError, match=r"No space left on device: needs [\d,]+ bytes, and [\d,]+ were free\. Free some space"):
            writer.save(tensors(2), progress(2))
        assert shutil.disk_usage(disk).free == size - short * PAGE
    backend = open_backend(disk)
    for name in backend.names():
        catalog.verify(backend, name)
    assert catalog.newest_valid(backend).progress.step == (1 if short else 2)
    assert not list(disk.glob(".step*"))
    (disk / "filler").unlink()
    writer.save(tensors(3), progress(3))
    assert catalog.newest_valid(backend).progress.step == 3
    assert (disk / "latest").read_text() == "step-00000003\n"
    assert not list(disk.glob(".*"))


# Whole runs: a checkpoint is 1.3 MB


@pytest.mark.slow
def test_a_run_with_a_full_disk_trains_on_for_the_tolerated_saves(workspace, disk):
    run = (f"checkpoint.directory={disk}", "checkpoint.every_steps=4", "checkpoint.max_failed_saves=1", "evaluate.every_steps=100")
    failed = workspace.train("full", *run, code=1)
    full = r"rank \d failed at step \d+: SaveError: rank \d: .*/step-00000012: No space left on device: needs [\d,]+ bytes, and [\d,]+ were"
    assert re.search(full, failed.stdout)
    assert "CHECKPOINT FAILED, 1 in a row" in failed.stdout
    lines = read_metrics(workspace.directory / "full/metrics.jsonl")
    failing = [line["step"] for line in lines if line.get("checkpoint/failures") == 1]
    assert failing[0] in range(9, 12), "the second save, of step 8, is the first to fail"
    assert lines[-1]["step"] in range(12, 16), "the third save, of step 12, is one too many"
    log = (workspace.directory / "full/logs/attempt-0001/rank-0000.log").read_text()
    assert "could not save; training continues (1 of 1 tolerated failures in a row): rank" in log
    assert not (workspace.directory / "full/logs/attempt-0002/rank-0000.log").exists(), "a restart would fail, too"
    backend = open_backend(disk)
    assert catalog.newest_valid(backend).progress.step == 4
    assert backend.names() == ["step-00000004"]
    assert not list(disk.glob(".*partial"))
    assert mount("-o", "remount,size=8m", str(disk)).returncode == 0
    assert workspace.manta("resume", "full", "train.steps=40").returncode == 0
    assert backend.names() == ["step-00000040", "step-00000036"]
    again = read_metrics(workspace.directory / "full/metrics.jsonl")
    assert [line["step"] for line in again] == list(range(1, 41))
    assert [line["attempt"] for line in again] == [1] * 4 + [2] * 36


@pytest.mark.slow
@pytest.mark.parametrize("stopped", ["manta", "rank 1"])
def test_a_stopped_run_that_cannot_save_reports_it(workspace, disk, stopped):
    run = f"stopped by {stopped}"
    more = (f"checkpoint.directory={disk}", "checkpoint.every_steps=4", "checkpoint.max_failed_saves=1000", "train.steps=4000")
    with workspace.start("train", str(workspace.config_file), f"run.dir={run}", *more) as running:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any(
            line["step"] == 12 for line in read_metrics(workspace.directory / run / "metrics.jsonl")
        ):
            time.sleep(0.05)
        ranks = next(e for e in read_events(workspace.directory / run / "events.jsonl") if e["event"] == "attempt-started")["ranks"]
        os.kill(running.pid if stopped == "manta" else ranks[1]["pid"], signal.SIGTERM)
        output = "".join(running.communicate(timeout=60))
        assert running.returncode == 143, output
    assert re.search(r"LeftUnsavedError: stop requested: rank \d: .*: No space left on device: needs [\d,]+ bytes, and [\d,]+ were", output)
    assert "stopped; step 4 is saved; resume with: manta resume" in output
    assert json.loads(workspace.manta("status", run, "--json").stdout)["state"] == "stopped, not saved"
    assert catalog.newest_valid(open_backend(disk)).progress.step == 4


@pytest.mark.slow
def test_a_run_does_not_start_if_checkpoints_cannot_be_written(workspace, disk):
    options = (f"checkpoint.directory={disk}", "checkpoint.every_steps=4", "train.steps=4")
    workspace.train("nowhere", *options)
    assert mount("-o", "remount,ro", str(disk)).returncode == 0
    refused = workspace.train("nowhere", *options[:-1], "train.steps=8", code=2)
    wanted = f"checkpoint.directory: expected a directory that can be written, got {disk} (Read-only file system). Choose another."
    assert wanted in refused.stderr
    alone, on_cpu = [sys.executable, "-P", "-m", "manta.trainer", "nowhere"], os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    failed = subprocess.run(alone, cwd=workspace.directory, env=on_cpu, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert re.search(rf": the attempt could not be recorded: .*{disk}/\S+: Read-only file system", failed.stderr)
    assert catalog.newest_valid(open_backend(disk)).progress.step == 4
