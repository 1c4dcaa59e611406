"""Whole runs with data.live: they resume exactly on the same number of data ranks, and are refused on another number or other text."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import MANTA
from runs import events, lines, losses, wait_for_step

STEPS = 80
LIVE = (
    "data.live=true",
    "data.sources=[documents/*.txt]",
    f"train.steps={STEPS}",
    "checkpoint.every_steps=5",
    "evaluate.every_steps=15",
)


def digests(workspace, run: str) -> list[int]:
    return [line["data/digest"] for line in lines(workspace, run)]


def validation_losses(workspace, run: str) -> list[float]:
    return [line["eval/loss"] for line in lines(workspace, run) if "eval/loss" in line]


@pytest.fixture(scope="module")
def finished_run(workspace) -> str:
    done = workspace.train("live", *LIVE)
    assert "text is tokenized while it is read; only 2 data ranks can resume this run" in done.stdout
    assert losses(workspace, "live")[-1] < losses(workspace, "live")[0] - 0.2
    assert len(set(digests(workspace, "live"))) == STEPS
    return "live"


@pytest.mark.slow
def test_a_run_resumes_with_the_same_samples_after_a_kill_and_a_stop(workspace, finished_run, tmp_path):
    run, on_cpu = "live again", os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with workspace.start("train", str(workspace.config_file), f"run.dir={run}", *LIVE, "cluster.hot_standby=true") as running:
        wait_for_step(workspace, run, 8, running)
        victim = next(event for event in events(workspace, run) if event["event"] == "attempt-started")["ranks"][1]["pid"]
        os.kill(victim, signal.SIGKILL)
        wait_for_step(workspace, run, 16, running)
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 75, running.stderr.read()
        running.communicate()
    assert [event["rank"] for event in events(workspace, run) if event["event"] == "rank-failed"] == [1]
    assert {line["attempt"] for line in lines(workspace, run)} == {1, 2}
    stopped = lines(workspace, run)[-1]["step"]
    assert stopped < STEPS

    saved = sorted((workspace.directory / run).glob("checkpoints/*/*"))
    message = "data.live: expected 2 data ranks, which have each read a share of the text, got 1. Start 2"
    refused = workspace.manta("resume", run, "cluster.ranks_per_node=1")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert message in refused.stderr
    alone = [sys.executable, "-P", "-m", "manta.trainer", str(workspace.directory / run)]  # as a supervisor with fewer ranks would start it
    by_hand = subprocess.run(alone, env=on_cpu, capture_output=True, text=True, timeout=120, check=False)
    assert by_hand.returncode == 2
    assert message in by_hand.stderr
    assert sorted((workspace.directory / run).glob("checkpoints/*/*")) == saved
    assert len(lines(workspace, run)) == stopped

    command = [MANTA, "resume", str(workspace.directory / run)]  # from another directory, without the sources
    done = subprocess.run(command, cwd=tmp_path, env=on_cpu, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(workspace, run) == losses(workspace, finished_run)  # bitwise
    assert digests(workspace, run) == digests(workspace, finished_run)
    assert validation_losses(workspace, run) == validation_losses(workspace, finished_run)


@pytest.mark.slow
def test_a_run_process_with_changed_text_is_refused(workspace, finished_run):
    changed = workspace.directory / "documents" / "argparse.txt"
    before = changed.stat()
    changed.write_text(changed.read_text() + "\n")
    try:
        refused = workspace.train(finished_run, *LIVE, f"train.steps={STEPS + 4}", code=2)
    finally:
        changed.write_text(changed.read_text()[:-1])
        os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "corpus fingerprint: expected" in refused.stderr
    assert len(lines(workspace, finished_run)) == STEPS
