"""Helpers for tests of whole runs: read a run's files, wait for a step, copy, resume and compare."""

import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from manta.cluster.supervise.event_log import read_events
from manta.trainer.metrics import parse_lines, read_metrics

METRICS = {  # the keys that readers of a line of metrics.jsonl rely on, besides the step
    "attempt": 1,
    "tokens": 256,
    "train/loss": 5.0,
    "data/digest": 1,
    "global_batch": 8,
    "sequence_length": 32,
    "step_time": 0.01,
    "tokens_per_second": 1e4,
    "world_size": 2,
    "layout": "data 2",
}


def lines(workspace, run: str) -> list[dict]:
    return read_metrics(workspace.directory / run / "metrics.jsonl")


def events(workspace, run: str) -> list[dict]:
    return read_events(workspace.directory / run / "events.jsonl")


def wait_for_step(workspace, run: str, step: int, process: subprocess.Popen, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if any(line["step"] >= step for line in lines(workspace, run)):
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"step {step} was not reached: {process.communicate()[1]}")


def losses(workspace, run: str) -> list[float]:
    return [line["train/loss"] for line in lines(workspace, run)]


def processes_of(workspace, run: str) -> list[psutil.Process]:
    """Return a run's ranks and standby processes."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(workspace.directory / run) in (p.info["cmdline"] or [])]


def copy_run(workspace, run: str, name: str) -> Path:
    copy = workspace.directory / name
    shutil.copytree(workspace.directory / run, copy)
    return copy


def copy_without_newest_checkpoint(workspace, run: str, name: str) -> str:
    """Copy a run without its newest checkpoint: `resume` then repeats the steps after the one before."""
    copy = copy_run(workspace, run, name)
    shutil.rmtree(max((copy / "checkpoints").glob("step-*")))
    return name


def resume(workspace, run: str, *overrides: str) -> list[dict]:
    """Resume a run to its end and return the metrics lines that this added."""
    metrics = workspace.directory / run / "metrics.jsonl"
    before = len(parse_lines(metrics.read_text()))
    result = workspace.manta("resume", run, *overrides)
    assert result.returncode == 0, result.stderr
    return parse_lines(metrics.read_text())[before:]


def assert_same_losses(repeated: list[dict], original: list[dict]) -> None:
    """Assert that each step read the same samples and has the same training and validation losses, up to fp32 rounding."""
    original_by_step = {line["step"]: line for line in original}
    for line in repeated:
        other = original_by_step[line["step"]]
        assert line["data/digest"] == other["data/digest"]
        keys = [key for key in line if key.startswith(("train/", "eval/"))]
        assert keys == [key for key in other if key.startswith(("train/", "eval/"))]
        assert [line[key] for key in keys] == pytest.approx([other[key] for key in keys], abs=1e-5)
