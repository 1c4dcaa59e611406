"""Ray's head is killed, alone or with the controller: no rank is left over, and the losses are those of a run that nobody disturbed."""

import os
import signal
import time

import pytest
from live_run import LiveRun, exactly, until

from manta.trainer.metrics import parse_lines

pytestmark = pytest.mark.slow
LINGER = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # Ray's own helpers, for up to a minute
SETTINGS = ("train.steps=240", "checkpoint.every_steps=20", "evaluate.every_steps=120", "evaluate.samples=8", "cluster.hot_standby=true")


@pytest.fixture(scope="module")
def undisturbed(workspace) -> list[list]:
    with LiveRun(workspace, "undisturbed head", *SETTINGS) as run:
        assert run.end()[0] == 0
        return exactly(run.lines())


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_run_whose_head_is_killed_saves_goes_on_under_another_and_does_no_step_twice(workspace, undisturbed, nodes):
    with LiveRun(workspace, f"{nodes} beheaded", *SETTINGS, f"cluster.nodes={nodes}", f"cluster.ranks_per_node={2 // nodes}") as run:
        run.steps(1, 30)
        os.kill(run.pid_of("gcs_server"), signal.SIGKILL)
        killed = time.time()
        assert run.event("head-lost", 1)["time"] - killed < 2
        code, told = run.end()
        assert code == 0, told
        assert not run.events("rank-failed") + run.events("node-lost"), "it costs no try"
        written = parse_lines((run.home / "metrics.jsonl").read_text())
        assert [line["step"] for line in written] == [line[0] for line in undisturbed]
        assert {line["attempt"] for line in written} == {1, 2}
        assert exactly(run.lines()) == undisturbed


def test_a_run_whose_head_and_controller_are_killed_leaves_nothing_and_the_same_command_goes_on(workspace, undisturbed):
    with LiveRun(workspace, "all gone", *SETTINGS) as run:
        run.steps(1, 30)
        os.kill(run.pid_of("gcs_server"), signal.SIGKILL)
        run.process.kill()
        run.process.wait()
        until(lambda: all(command.startswith(LINGER) for command in run.processes().values()), within=5)
    with LiveRun(workspace, "all gone", *SETTINGS) as again:
        code, told = again.end()
        assert code == 0, told
        assert [event["took_over"] for event in again.events("run-started")] == [False, True]
        assert exactly(again.lines()) == undisturbed
