"""`manta drill`: a run survives all injected faults, and one whose losses change fails."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from run_process import until

from manta.cluster.supervise.stragglers import LASTING
from manta.launch.drill.faults import FaultResult, FaultScript, RunMonitor
from manta.trainer.run_directory import RunDirectory

# Forward passes take longer than the 10 ms per step that straggler detection ignores.
BATCH = ("train.global_batch=64", "train.micro_batch=32")
DRILL = ("run.dir=drilled", "cluster.step_timeout=5", "cluster.hot_standby=true", "precision=fp32", *BATCH)

DRIFTING = """
import os
from manta.trainer.model.llama import Llama

class Drifting(Llama):
    def __init__(self, config, **more):
        super().__init__(config, **more)
        self.norm.epsilon = 1e-3 * int(os.environ.get("MANTA_ATTEMPT", 1))
"""


@pytest.mark.slow
def test_a_run_survives_every_fault_with_the_same_losses(workspace):
    start = time.monotonic()
    result = workspace.manta("drill", str(workspace.config_file), *DRILL, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    assert time.monotonic() - start < 180
    lines = result.stdout.splitlines()
    rows = {re.split(r"  +", line)[0]: line for line in lines[1:-1]}
    assert list(rows) == [
        "rank killed",
        "disk full",
        "rank hung",
        "rank slowed",
        "bit flipped in a checkpoint",
        "agent killed",
        "node lost",
    ]
    assert all("bitwise the same" in row for row in rows.values())
    assert re.fullmatch(r"passed: 7 faults in \d+ steps", lines[-1])
    assert not list(workspace.directory.glob("drilled*"))
    assert [line for line in result.stderr.splitlines() if line.startswith("fault ")][1] == "fault 2 of 7: disk full"


def test_what_a_fault_has_led_to_is_said_in_words():
    """Numbers alone, as in the table below its headings, would say nothing."""
    killed = FaultResult(fault="rank killed", detected=0.104, resumed=1.27, recomputed=1)
    assert killed.text() == "rank killed: detected after 0.10 s, resumed after 1.27 s, 1 step recomputed"
    slowed = FaultResult(fault="rank slowed", detected=33, keeps_running=True, note="reported")
    assert slowed.text() == "rank slowed: detected after 33.00 s, kept running, reported"
    assert FaultResult(fault="disk full", skipped="no disk").text() == "disk full: skipped: no disk"


def test_a_slow_rank_that_is_not_reported_does_not_end_the_drill(tmp_path, monkeypatch):
    """On a machine that is busy with other programs, ranks wait for cores anyway. The other faults follow, and the losses are compared."""
    monitor, cleared = RunMonitor(RunDirectory(tmp_path)), []
    script = FaultScript(None, None, monitor)
    monkeypatch.setattr(script, "_inject", lambda _fault: ("injector", time.time() - 3 * LASTING))
    monkeypatch.setattr(script, "_clear", cleared.append)
    result = FaultResult(fault="rank slowed")
    for polls, _ in enumerate(script._rank_slowed(result)):
        assert not cleared
        monitor.lines.append({"step": polls})
        assert polls < 100
    assert (result.detected, cleared) == (None, ["injector"])
    assert result.text().startswith("rank slowed: detected after NEVER, kept running, not reported within")


@pytest.mark.slow
def test_a_run_whose_losses_change_after_a_fault_fails(workspace):
    """Its norm differs in each attempt."""
    (workspace.directory / "drifting.py").write_text(DRIFTING)
    result = workspace.manta("drill", str(workspace.config_file), *DRILL, "model.family=drifting:Drifting", timeout=400)
    assert result.returncode == 1, result.stderr
    lines = result.stdout.splitlines()
    assert "DIFFER BY" in next(line for line in lines if line.startswith("rank killed"))
    (kept,) = workspace.directory.glob("drilled-drill-*")
    assert re.fullmatch(rf"failed: rank killed, .*; both runs are in {re.escape(str(kept))}", lines[-1])
    shutil.rmtree(kept)


@pytest.mark.parametrize(("target", "where"), [("slurm", "in an allocation"), ("kubernetes", "in a pod")])
def test_a_drill_is_refused_on_targets_that_take_over_the_run(workspace, target, where):
    refused = workspace.manta("drill", str(workspace.config_file), "--on", target)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert f"got {target}, which runs only whole jobs. Run the command {where}" in refused.stderr
    assert not list(workspace.directory.glob("run-drill*"))


@pytest.mark.root
def test_a_full_disk_is_a_real_one_and_ends_with_the_injector(tmp_path):
    (tmp_path / "older").write_text("checkpoint")
    program = "import asyncio, os, sys; from manta.cluster.supervise.fault_injection import FaultInjector; injector = FaultInjector(); "
    program += "asyncio.run(injector.inject('full', os.getpid(), sys.argv[1])); print('full', flush=True); sys.stdin.readline(); "
    program += "asyncio.run(injector.clear(os.getpid())); print('clear', flush=True); sys.stdin.readline()"
    command = [sys.executable, "-P", "-c", program, str(tmp_path)]
    for ends_by_itself in (True, False):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as injector:
            assert injector.stdout.readline() == b"full\n"
            if not os.path.ismount(tmp_path):
                pytest.skip("no file system can be mounted")
            assert not list(tmp_path.iterdir())
            with pytest.raises(OSError, match="No space left on device"):
                (tmp_path / "newer").write_bytes(bytes(1 << 20))
            if ends_by_itself:
                injector.stdin.write(b"\n")
                injector.stdin.flush()
                assert injector.stdout.readline() == b"clear\n"
                assert not os.path.ismount(tmp_path)
            injector.kill()
        until(lambda: not os.path.ismount(tmp_path), within=10)
        assert [path.name for path in tmp_path.iterdir()] == ["older"]
