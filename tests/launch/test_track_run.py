"""Real runs with trackers that are killed, frozen, or have a full disk: their losses are those of a run without trackers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mounts import fill_up
from recorded_run import RecordedRun
from run_process import RunProcess, exact_values, run_undisturbed, until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow
SETTINGS = ("train.steps=200", "evaluate.every_steps=100", "checkpoint.every_steps=50")


@pytest.fixture(scope="module")
def reference(workspace) -> list[list]:
    """The losses of a run without trackers."""
    return exact_values(run_undisturbed(workspace, "untracked", *SETTINGS))


def tracked(workspace, name: str, *more: str) -> RunProcess:
    return RunProcess(workspace, name, *SETTINGS, "track.tensorboard=true", *more)


def tracker(run: RunProcess) -> int:
    """Return the id of the process, once it has written something."""
    run.until(lambda: any(file.stat().st_size for file in (run.directory / "tensorboard").glob("*")))
    return run.pid_of("-m manta.launch.track")


def assert_same(run: RunProcess, reference: list[list]) -> None:
    code, output = run.end()
    assert code == 0, output
    assert exact_values(run.lines()) == reference


def assert_read_back(run: RunProcess) -> None:
    found = EventAccumulator(str(run.directory / "tensorboard"), size_guidance={"scalars": 0}).Reload().Scalars("train/loss")
    assert {value.step: value.value for value in found} == pytest.approx({line["step"]: line["train/loss"] for line in run.lines()})
    assert len(found) == len(run.lines())


def test_a_killed_tracker_is_started_again_and_misses_nothing(workspace, reference):
    with tracked(workspace, "tracker killed") as run:
        run.steps(1, 5)
        os.kill(tracker(run), signal.SIGKILL)
        ended = run.event("tracker-ended")
        assert (ended["message"], ended["starts"]) == ("killed by SIGKILL", 1)
        os.kill(run.pids(1)[1], signal.SIGKILL)  # and a rank, so that steps are rolled back
        assert_same(run, reference)
        assert "the trackers ended, and are started again: killed by SIGKILL" in run.stderr.read_text()
        assert_read_back(run)
        assert "Traceback" not in (run.directory / "logs/companion.log").read_text()


def test_a_frozen_tracker_holds_up_only_the_end_of_the_command(workspace, reference):
    with tracked(workspace, "tracker frozen") as run:
        run.steps(1, 5)
        os.kill(tracker(run), signal.SIGSTOP)
        run.event("run-ended")
        ended = time.monotonic()
        assert_same(run, reference)
        assert time.monotonic() - ended < 15
        assert run.events("tracker-ended") == []


def test_a_tracker_whose_disk_is_full_disturbs_nothing(workspace, reference, disk):
    (workspace.directory / "tracker full").mkdir()
    (workspace.directory / "tracker full/tensorboard").symlink_to(disk)
    fill_up(disk / "filler")
    with tracked(workspace, "tracker full") as run:
        log = run.directory / "logs/companion.log"
        run.until(lambda: log.exists() and log.read_text().count("tensorboard: OSError: [Errno 28] No space left on device") > 1)
        assert_same(run, reference)
        assert "Traceback" not in log.read_text()


def test_nothing_is_left_of_a_tracker_when_the_controller_is_killed(workspace):
    with tracked(workspace, "controller killed") as run:
        run.steps(1, 5)
        process = psutil.Process(tracker(run))
        run.process.kill()
        until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, within=10)


def test_it_starts_in_a_second_and_then_takes_3_percent_of_a_core_at_most(tmp_path):
    run = RecordedRun(tmp_path / "run")
    run.to_the_kill()
    with run.running():
        command = [sys.executable, "-P", "-m", "manta.launch.track", str(run.directory)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            until(lambda: any(file.stat().st_size > 2000 for file in Path(run.directory, "tensorboard").glob("*")))
            times = psutil.Process(process.pid).cpu_times()
            assert times.user + times.system < 1.5  # seconds of CPU, also on a machine that does other things
            before, since = times.user + times.system, time.monotonic()
            for step in range(10, 210):  # ten steps a second
                run.steps(1, step, step)
                time.sleep(0.1)
            times = psutil.Process(process.pid).cpu_times()
            assert (times.user + times.system - before) / (time.monotonic() - since) < 0.03
