"""Helpers for tests of whole runs: read a run's files, wait for a step, copy, resume and compare."""

import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from manta.cluster.supervise.event_log import read_events
from manta.trainer.metrics import parse, read_metrics


def lines(case, run: str) -> list[dict]:
    return read_metrics(case.home / run / "metrics.jsonl")


def events(case, run: str) -> list[dict]:
    return read_events(case.home / run / "events.jsonl")


def wait_for_step(case, run: str, step: int, process: subprocess.Popen, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if any(line["step"] >= step for line in lines(case, run)):
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"step {step} never came: {process.communicate()[1]}")


def losses(case, run: str) -> list[float]:
    return [line["train/loss"] for line in lines(case, run)]


def of_run(case, run: str) -> list[psutil.Process]:
    """Ranks and spares of a run."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(case.home / run) in (p.info["cmdline"] or [])]


def copy_of(case, run: str, name: str) -> Path:
    """A run of its own, as far as `run` has come."""
    copy = case.home / name
    shutil.copytree(case.home / run, copy)
    return copy


def taken_back(case, run: str, name: str) -> str:
    """A copy of a run without its newest checkpoint: what it did from there on is to be done again."""
    copy = copy_of(case, run, name)
    shutil.rmtree(max((copy / "checkpoints").glob("step-*")))
    return name


def resume(case, run: str, *overrides: str) -> list[dict]:
    """What the run has done from here on."""
    begun = parse((case.home / run / "metrics.jsonl").read_text())
    done = case.manta("resume", run, *overrides)
    assert done.returncode == 0, done.stderr
    return parse((case.home / run / "metrics.jsonl").read_text())[len(begun) :]


def assert_same(again: list[dict], before: list[dict]) -> None:
    """The same samples at each step, and the same losses, of training and of validation, as well as fp32 can tell."""
    then = {line["step"]: line for line in before}
    for line in again:
        other = then[line["step"]]
        assert line["data/digest"] == other["data/digest"]
        told = [key for key in line if key.startswith(("train/", "eval/"))]
        assert told == [key for key in other if key.startswith(("train/", "eval/"))]
        assert [line[key] for key in told] == pytest.approx([other[key] for key in told], abs=1e-5)
