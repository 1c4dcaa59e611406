"""Ray's head is killed, alone or with the controller: no rank is left over, and the losses are those of a run that nobody disturbed."""

import os
import signal
import time

import pytest
from live_run import LiveRun, exactly, until

pytestmark = pytest.mark.slow
SETTINGS = ("train.steps=1200", "checkpoint.every_steps=20", "evaluate.every_steps=600", "evaluate.samples=8", "cluster.keep_warm=true")


@pytest.fixture(scope="module")
def undisturbed(case) -> list[list]:
    with LiveRun(case, "undisturbed head", *SETTINGS) as run:
        assert run.end()[0] == 0
        return exactly(run.lines())


def test_a_run_whose_head_is_killed_saves_starts_another_and_loses_no_step(case, undisturbed):
    with LiveRun(case, "beheaded", *SETTINGS) as run:
        run.steps(1, 30)
        os.kill(run.pid_of("gcs_server"), signal.SIGKILL)
        killed = time.time()
        assert run.event("first-step", 2, within=60)["time"] - killed < 20
        code, told = run.end()
        assert code == 0, told
        assert exactly(run.lines()) == undisturbed


def test_a_run_whose_head_and_controller_are_killed_leaves_nothing_and_the_same_command_goes_on(case, undisturbed):
    with LiveRun(case, "all gone", *SETTINGS) as run:
        run.steps(1, 30)
        old = run.pids(1)
        os.kill(run.pid_of("gcs_server"), signal.SIGKILL)
        run.process.kill()
        run.process.wait()
        until(lambda: not set(old) & set(run.processes()), within=5)
        until(lambda: not run.processes(), within=90)
    with LiveRun(case, "all gone", *SETTINGS) as again:
        code, told = again.end()
        assert code == 0, told
        assert [event["took_over"] for event in again.events("run-started")] == [False, True]
        assert exactly(again.lines()) == undisturbed
