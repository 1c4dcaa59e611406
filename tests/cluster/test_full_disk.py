"""Runs with a run directory, or a folder for temporary files, on a disk that fills up."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from mounts import fill_up, read_only_tmp
from run_process import RunProcess, exact_values, run_undisturbed

from manta.trainer.metrics import parse_lines

pytestmark = pytest.mark.slow
SETTINGS = ("train.steps=300", "evaluate.every_steps=100", "checkpoint.every_steps=20", "cluster.hot_standby=true")
FULL = "training continues, "


@pytest.fixture(scope="module")
def reference(workspace) -> list[list]:
    return exact_values(run_undisturbed(workspace, "with room", *SETTINGS))


def on(disk: Path, workspace, name: str, *more: str) -> RunProcess:
    """Start a run with its directory on the disk, and its checkpoints elsewhere."""
    checkpoints = workspace.directory / f"{name} checkpoints"
    run = RunProcess(workspace, name, *SETTINGS, f"run.dir={json.dumps(str(disk / 'run'))}", f"checkpoint.directory={checkpoints}", *more)
    run.directory = disk / "run"
    return run


def step_of(pid: int) -> int:
    """Return the step in a rank's heartbeat."""
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        if "/heartbeat-" in str(link.readlink()):
            return json.loads(link.read_bytes())["step"]
    return 0


def test_metrics_and_events_wait_for_room_even_if_a_rank_dies(workspace, disk, reference):
    with on(disk, workspace, "full for a while") as run:
        run.steps(1, 30)
        fill_up(disk / "filler")
        run.until(lambda: FULL in run.stderr.read_text())
        before = step_of(run.pids(1)[0])
        run.until(lambda: step_of(run.pids(1)[0]) > before + 30)
        written = len((disk / "run/metrics.jsonl").read_bytes())
        os.kill(run.pids(1)[1], signal.SIGKILL)
        run.until(lambda: "attempt 2: resumed from step" in run.stderr.read_text())
        assert len((disk / "run/metrics.jsonl").read_bytes()) - written < 8192
        (disk / "filler").unlink()
        code, output = run.end()
        assert code == 0, output
        assert output.count(FULL) == 1
        assert "No space left on device: training continues, " in output
        assert output.count("there is room again, everything is written") == 1
        kinds = [json.loads(line)["event"] for line in (disk / "run/events.jsonl").read_text().splitlines()]
        first = ["run-started", "attempt-started", "disk-full", "attempt-stopped", "attempt-started"]
        assert [kind for kind in kinds if kind.startswith(("run-", "attempt-", "disk-"))] == [
            *first,
            "disk-free",
            "attempt-stopped",
            "run-ended",
        ]
        lost = {line["step"] for line in parse_lines((disk / "run/metrics.jsonl").read_text())} ^ set(range(1, 301))
        resumed = run.events("loaded", 2)[0]["step"]
        assert all(step <= resumed for step in lost), "only lines that waited in the killed rank 0's memory may be missing"
        assert exact_values(run.lines()) == [line for line in reference if line[0] not in lost]


def test_a_run_whose_disk_stays_full_ends_with_a_line_and_exit_code_1(workspace, disk):
    with on(disk, workspace, "full for ever") as run:
        run.steps(1, 30)
        fill_up(disk / "filler")
        code, output = run.end()
        assert code == 1, output
        assert "Traceback" not in output
        metrics = disk / "run/metrics.jsonl"
        assert f"SaveError: {metrics}: No space left on device: needs " in output
        assert metrics.read_bytes().endswith(b"\n")
    (disk / "filler").unlink()
    with on(disk, workspace, "full for ever") as again:
        code, output = again.end()
        assert code == 0, output


def test_a_run_does_not_start_on_a_full_disk(workspace, disk):
    fill_up(disk / "filler")
    with on(disk, workspace, "full from the start") as run:
        code, output = run.end()
        assert (code, len(output.splitlines())) == (1, 1), output
        assert "No space left on device. Free some space." in output


def test_output_of_a_rank_that_cannot_be_written_does_not_end_it():
    program = "from manta.trainer.__main__ import drop_unwritable_output as drop; drop(); import logging, os, sys; print('x' * 100_000); "
    program += "logging.basicConfig(); logging.error('y'); sys.stderr.write('z' * 9000); sys.stdout.flush(); os._exit(7)"
    command = ["sh", "-c", f'"{sys.executable}" -P -c "{program}" >/dev/full 2>&1']
    assert os.waitstatus_to_exitcode(os.spawnvp(os.P_WAIT, "sh", command) << 8) == 7


def test_a_full_folder_for_temporary_files_and_shared_memory_end_no_run(workspace, reference):
    """They fill up once the run has started: it trains on, also after a rank was killed."""
    small = "for folder in /var/tmp /dev/shm; do mount -t tmpfs -o size=40m tmpfs $folder; done"
    inside = ["unshare", "-m", "--propagation", "private", "sh", "-c", f'{read_only_tmp(workspace.directory)} && {small} && exec "$0" "$@"']
    with RunProcess(workspace, "temporary", *SETTINGS, inside=inside, TMPDIR="/var/tmp") as run:
        run.steps(1, 10)
        root = Path(f"/proc/{run.process.pid}/root")
        for folder in ("var/tmp", "dev/shm"):
            fill_up(root / folder / "filler")
        os.kill(run.pids(1)[1], signal.SIGKILL)
        code, output = run.end()
        assert code == 0, output
        assert exact_values(run.lines()) == reference
