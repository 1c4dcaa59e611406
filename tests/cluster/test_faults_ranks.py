"""Ranks of real runs that are stopped, killed, starved and hung: each run ends with the losses of one that nobody disturbed, bit by bit."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch
from live_run import LiveRun, exactly

pytestmark = pytest.mark.slow
STEPS = 120
SETTINGS = (f"train.steps={STEPS}", "checkpoint.every_steps=10", "evaluate.every_steps=60", "evaluate.samples=8")
SIZES = {"layers": 2, "width": 64, "heads": 4, "mlp_width": 128}


@pytest.fixture(scope="module")
def undisturbed(workspace) -> list[list]:
    with LiveRun(workspace, "undisturbed by faults", *SETTINGS) as run:
        assert run.end()[0] == 0
        return exactly(run.lines())


def stop(run, attempt):
    os.kill(run.pids(attempt)[1], signal.SIGSTOP)


def fault(run, attempt):
    os.kill(run.pids(attempt)[0], signal.SIGSEGV)


def abort(run, attempt):
    os.kill(run.pids(attempt)[1], signal.SIGABRT)


def kill_both(run, attempt):
    for pid in run.pids(attempt):
        os.kill(pid, signal.SIGKILL)


def kill_the_agent(run, attempt):
    os.kill(psutil.Process(run.pids(attempt)[0]).ppid(), signal.SIGKILL)


FAULTS = [stop, fault, abort, kill_both, kill_the_agent]


def test_a_run_that_loses_ranks_by_every_means_loses_no_bit(workspace, undisturbed):
    with LiveRun(workspace, "hurt", *SETTINGS, "cluster.step_timeout=5", "cluster.hot_standby=true") as run:
        for attempt, hurt in enumerate(FAULTS, start=1):
            run.steps(attempt, 12)
            hurt(run, attempt)
        code, told = run.end()
        assert code == 0, told
        failed = {event["attempt"]: event for event in run.events("rank-failed")}
        assert (failed[1]["cause"], failed[1]["rank"]) == ("HANG", 1)
        assert failed[1]["message"].endswith("its process is stopped")
        assert [failed[attempt]["message"] for attempt in (2, 3, 4)] == [f"killed by {name}" for name in ("SIGSEGV", "SIGABRT", "SIGKILL")]
        assert [failed[attempt]["rank"] for attempt in (2, 3)] == [0, 1]
        assert all(failed[attempt]["noticed_after"] < 1 for attempt in (2, 3, 4))
        assert [event["attempt"] for event in run.events("node-lost")] == [5]
        stacks = (run.home / "logs/attempt-0001/rank-0000.log").read_text()  # a stopped process can not write its own
        assert re.search(r'most recent call first(.*\n)+.*trainer/loop\.py", line \d+ in _step', stacks)
        assert exactly(run.lines()) == undisturbed


@pytest.mark.parametrize("phase", ["", "load", "compile", "step", "evaluate", "save"])
def test_a_run_told_to_leave_in_any_phase_saves_and_goes_on(workspace, undisturbed, phase):
    """Told before the first step, as its ranks import or load, it leaves after that step."""
    if phase == "compile" and (shutil.which("g++") is None or " " in torch.__file__):
        pytest.skip("no C++ compiler on this machine")
    more = {
        "compile": ["train.compile=true"],
        "evaluate": ["evaluate.every_steps=7", "evaluate.samples=2000"],
        "save": ["checkpoint.every_steps=1", "checkpoint.asynchronous=false"],
    }.get(phase, [])
    name = f"told in {phase or 'import'}"
    with LiveRun(workspace, name, *SETTINGS, *more) as run:
        first = run.pids(1)[0]
        run.until(lambda: run.phase(first) == phase)
        run.process.send_signal(signal.SIGTERM)
        code, told = run.end(within=100)
        assert code == 75, told
        (leaving,), (stopped,) = run.events("leaving"), run.events("attempt-stopped")
        assert stopped["time"] - leaving["time"] < leaving["grace"]
        steps = [line["step"] for line in run.lines()]
        saved = [int(path.name[5:]) for path in (run.home / "checkpoints").glob("step-*")]
        assert max(saved) == steps[-1] < STEPS
    assert workspace.manta("checkpoint", "verify", name).returncode == 0
    with LiveRun(workspace, name, "resume", name) as again:
        assert again.end()[0] == 0
        if phase == "evaluate":  # others are evaluated
            assert [line[:5] for line in exactly(again.lines())] == [line[:5] for line in undisturbed]
        elif phase != "compile":  # compiled code adds in another order
            assert exactly(again.lines()) == undisturbed


def test_a_run_that_has_no_time_to_leave_as_its_ranks_start_says_that_nothing_is_saved_and_begins_anew(workspace, undisturbed):
    with LiveRun(workspace, "told at once", *SETTINGS, "cluster.grace_period=0.5") as run:
        run.event("attempt-started")
        run.process.send_signal(signal.SIGTERM)
        code, told = run.end(within=60)
        assert code == 143, told
        assert "nothing is saved yet" in told
    with LiveRun(workspace, "told at once", *SETTINGS) as again:
        assert again.end()[0] == 0
        assert exactly(again.lines()) == undisturbed


def test_two_ctrl_c_end_all_at_once_and_what_was_saved_goes_on(workspace, undisturbed):
    with LiveRun(workspace, "impatient", *SETTINGS) as run:
        run.steps(1, 15)
        for _ in range(2):
            os.killpg(run.process.pid, signal.SIGINT)
            run.until(lambda: run.events("leaving"))
        code, told = run.end(within=15)
        assert code == 130, told
    with LiveRun(workspace, "impatient", "resume", "impatient") as again:
        assert again.end()[0] == 0
        assert exactly(again.lines()) == undisturbed


HURT = '''
import os
import resource
import time
from pathlib import Path

import torch
import torch.distributed as dist

from manta.trainer.model.llama import Llama


def skip():
    """The barrier, that is."""


def sleep():
    time.sleep(1000)


def allocate():
    room()
    return torch.ones(1 << 30)


def fill():
    room()
    return bytearray(1 << 32)


def grow():
    kept = []
    while True:
        kept.append(torch.ones(1 << 22))


def room():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))


class Hurt(Llama):
    """All ranks meet in each forward pass; in the ninth, rank 1 does what it is told, once."""

    passes = 0

    def forward(self, batch, divisors_K):
        self.passes += self.training
        fault, marker = self.config.options["fault"], Path(self.config.options["marker"])
        if self.training and self.passes == 9 and os.environ["RANK"] == "1" and not marker.exists():
            marker.touch()
            globals()[fault]()
        elif self.training:
            dist.barrier()
        return super().forward(batch, divisors_K)
'''


def hurt(workspace, name: str, fault: str, *more: str, spared: bool = False, **how) -> LiveRun:
    (workspace.directory / "hurt_model.py").write_text(HURT)
    marker = workspace.directory / f"{name}.marker"
    if spared:
        marker.touch()
    model = json.dumps({"family": "hurt_model:Hurt", "options": {"fault": fault, "marker": str(marker)}, **SIZES})
    return LiveRun(workspace, name, f"model={model}", "train.steps=30", "checkpoint.every_steps=6", *more, **how)


@pytest.fixture(scope="module")
def spared(workspace) -> list[list]:
    with hurt(workspace, "spared", "skip", spared=True) as run:
        assert run.end()[0] == 0
        return exactly(run.lines())


@pytest.mark.parametrize("fault", ["skip", "sleep"])
def test_a_rank_that_skips_a_collective_or_sleeps_is_a_hang_with_step_and_phase_and_costs_no_bit(workspace, spared, fault):
    with hurt(workspace, f"hung by {fault}", fault, "cluster.step_timeout=5") as run:
        code, told = run.end()
        assert code == 0, told
        (failed,) = run.events("rank-failed")
        assert (failed["cause"], failed["step"]) == ("HANG", 8)
        assert fault == "skip" or failed["rank"] == 1, "it skipped nothing that the other could be seen to wait for"
        why = ", while others wait for it in a collective" if fault == "sleep" else ""
        assert re.search(
            rf"rank {failed['rank']} failed at step 8: rank {failed['rank']} gave no sign of life for 5\.\d s in phase step{why}", told
        )
        logs = [(run.home / f"logs/attempt-0001/rank-{rank:04d}.log").read_text() for rank in (0, 1)]
        assert "in barrier" in logs[0]
        assert "in barrier" not in logs[1]
        assert all("most recent call first" in log for log in logs), "each one's stack says where it stood"
        assert exactly(run.lines()) == spared


@pytest.mark.parametrize("fault", ["allocate", "fill"])
def test_a_rank_that_can_get_no_memory_ends_the_run_and_says_what_to_lower(workspace, fault):
    with hurt(workspace, f"starved by {fault}", fault) as run:
        code, told = run.end()
        assert code == 1, told
        assert re.search(r"give up: rank 1: \w+: .*; lower train\.micro_batch", told, re.DOTALL)
        assert [event["cause"] for event in run.events("rank-failed")] == ["OUT_OF_MEMORY"]


@pytest.fixture
def cgroup():
    """A control group for 3 GB of memory, and what puts a command into it."""
    line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line or line.startswith("0::"))
    kind, path = ("memory", line.split(":memory:")[1]) if ":memory:" in line else ("", line[3:])
    group = Path("/sys/fs/cgroup", kind, path.strip("/"), f"manta-{os.getpid()}")
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if kind else "memory.max")).write_text("3G")
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$0" "$@"']
    group.rmdir()


def test_a_rank_that_the_kernel_kills_for_want_of_memory_is_told_from_any_other_that_is_killed(workspace, cgroup):
    with hurt(workspace, "killed by the kernel", "grow", inside=cgroup) as run:
        code, told = run.end()
        assert code == 1, told
        (failed,) = run.events("rank-failed")
        assert (failed["cause"], failed["rank"], failed["code"]) == ("OUT_OF_MEMORY", 1, -signal.SIGKILL)
        assert "rank 1: SIGKILL: the kernel killed it, for memory ran out; lower train.micro_batch" in told
