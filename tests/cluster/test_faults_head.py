"""Ray's head is killed, with or without the controller: no rank remains, and losses equal those of a run without faults."""

import os
import signal
import time

import pytest
from run_process import RunProcess, exact_values, until

from manta.trainer.metrics import parse_lines

pytestmark = pytest.mark.slow
LINGERING = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "default_worker.py")  # Ray's own, for up to a minute; the last has no agent yet
SETTINGS = ("train.steps=240", "checkpoint.every_steps=20", "evaluate.every_steps=120", "evaluate.samples=8", "cluster.hot_standby=true")


@pytest.fixture(scope="module")
def reference(workspace) -> list[list]:
    with RunProcess(workspace, "head reference", *SETTINGS) as run:
        assert run.end()[0] == 0
        return exact_values(run.lines())


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_run_saves_and_resumes_under_another_head(workspace, reference, nodes):
    with RunProcess(
        workspace, f"{nodes} without a head", *SETTINGS, f"cluster.nodes={nodes}", f"cluster.ranks_per_node={2 // nodes}"
    ) as run:
        run.steps(1, 30)
        os.kill(run.pid_of("gcs_server"), signal.SIGKILL)
        killed = time.time()
        assert run.event("head-lost", 1)["time"] - killed < 2
        code, output = run.end()
        assert code == 0, output
        assert not run.events("rank-failed") + run.events("node-lost"), "it does not count as a failure"
        written = parse_lines((run.directory / "metrics.jsonl").read_text())
        assert [line["step"] for line in written] == [line[0] for line in reference]
        assert {line["attempt"] for line in written} == {1, 2}
        assert exact_values(run.lines()) == reference


def test_a_run_resumes_after_head_and_controller_were_killed(workspace, reference):
    with RunProcess(workspace, "all gone", *SETTINGS) as run:
        run.steps(1, 30)
        os.kill(run.pid_of("gcs_server"), signal.SIGKILL)
        run.process.kill()
        run.process.wait()
        until(lambda: all(any(name in command for name in LINGERING) for command in run.command_lines().values()), within=5)
    with RunProcess(workspace, "all gone", *SETTINGS) as again:
        code, output = again.end()
        assert code == 0, output
        assert [event["took_over"] for event in again.events("run-started")] == [False, True]
        assert exact_values(again.lines()) == reference
