"""`manta drill`: a run comes through all faults of a rehearsal, and one that does not learn the same is told of."""

import re
import shutil
import time

import pytest

DRILL = ("run.dir=drilled", "cluster.step_timeout=5", "cluster.hot_standby=true", "precision=fp32")

DRIFTING = """
import os
from manta.trainer.model.llama import Llama

class Drifting(Llama):
    def __init__(self, config, **more):
        super().__init__(config, **more)
        self.norm.epsilon = 1e-3 * int(os.environ.get("MANTA_ATTEMPT", 1))
"""


@pytest.mark.slow
def test_every_fault_is_noticed_come_through_and_changes_no_loss(workspace):
    begun = time.monotonic()
    done = workspace.manta("drill", str(workspace.config_file), *DRILL, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - begun < 180
    told = done.stdout.splitlines()
    rows = {re.split(r"  +", line)[0]: line for line in told[1:-1]}
    assert list(rows) == [
        "rank killed",
        "disk full",
        "rank hung",
        "rank slowed",
        "bit flipped in a checkpoint",
        "agent killed",
        "node lost",
    ]
    assert all("the same, bit by bit" in row for row in rows.values())
    assert re.fullmatch(r"passed: 7 faults in \d+ steps", told[-1])
    assert not list(workspace.directory.glob("drilled*"))


@pytest.mark.slow
def test_a_run_that_learns_something_else_after_a_fault_has_failed(workspace):
    """Its norm is another one in each attempt."""
    (workspace.directory / "drifting.py").write_text(DRIFTING)
    done = workspace.manta("drill", str(workspace.config_file), *DRILL, "model.family=drifting:Drifting", timeout=400)
    assert done.returncode == 1, done.stderr
    told = done.stdout.splitlines()
    assert "OTHER, BY" in next(line for line in told if line.startswith("rank killed"))
    (kept,) = workspace.directory.glob("drilled-drill-*")
    assert re.fullmatch(rf"failed: rank killed, .*; both runs lie in {re.escape(str(kept))}", told[-1])
    shutil.rmtree(kept)


@pytest.mark.parametrize(("on", "there"), [("slurm", "in an allocation"), ("kubernetes", "in a pod")])
def test_where_a_run_is_handed_over_a_drill_is_given_from_there(workspace, on, there):
    refused = workspace.manta("drill", str(workspace.config_file), "--on", on)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert f"--on: got {on}, to which only a whole run is handed over; give the command {there}" in refused.stderr
    assert not list(workspace.directory.glob("run-drill*"))
