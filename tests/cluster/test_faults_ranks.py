"""Ranks of real runs that stop, die, hang or run out of memory: losses are bitwise those of a run without faults."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch
from run_process import RunProcess, exact_values

pytestmark = pytest.mark.slow
STEPS = 120
SETTINGS = (f"train.steps={STEPS}", "checkpoint.every_steps=10", "evaluate.every_steps=60", "evaluate.samples=8")
SIZES = {"layers": 2, "width": 64, "heads": 4, "mlp_width": 128}


@pytest.fixture(scope="module")
def reference(workspace) -> list[list]:
    with RunProcess(workspace, "without faults", *SETTINGS) as run:
        assert run.end()[0] == 0
        return exact_values(run.lines())


def stop(run, attempt):
    os.kill(run.pids(attempt)[1], signal.SIGSTOP)


def segfault(run, attempt):
    os.kill(run.pids(attempt)[0], signal.SIGSEGV)


def abort(run, attempt):
    os.kill(run.pids(attempt)[1], signal.SIGABRT)


def kill_both(run, attempt):
    for pid in run.pids(attempt):
        os.kill(pid, signal.SIGKILL)


def kill_the_agent(run, attempt):
    os.kill(psutil.Process(run.pids(attempt)[0]).ppid(), signal.SIGKILL)


FAULTS = [stop, segfault, abort, kill_both, kill_the_agent]


def test_losses_are_bitwise_the_same_after_every_kind_of_rank_failure(workspace, reference):
    with RunProcess(workspace, "rank faults", *SETTINGS, "cluster.step_timeout=5", "cluster.hot_standby=true") as run:
        for attempt, inject in enumerate(FAULTS, start=1):
            run.steps(attempt, 12)
            inject(run, attempt)
        code, output = run.end()
        assert code == 0, output
        failed = {event["attempt"]: event for event in run.events("rank-failed")}
        assert (failed[1]["cause"], failed[1]["rank"]) == ("HANG", 1)
        assert failed[1]["message"].endswith("its process is stopped")
        assert [failed[attempt]["message"] for attempt in (2, 3, 4)] == [f"killed by {name}" for name in ("SIGSEGV", "SIGABRT", "SIGKILL")]
        assert [failed[attempt]["rank"] for attempt in (2, 3)] == [0, 1]
        assert all(failed[attempt]["noticed_after"] < 1 for attempt in (2, 3, 4))
        assert [event["attempt"] for event in run.events("node-lost")] == [5]
        stacks = (run.directory / "logs/attempt-0001/rank-0000.log").read_text()  # a stopped process can not write its own
        assert re.search(r'most recent call first(.*\n)+.*trainer/loop\.py", line \d+ in _step', stacks)
        assert exact_values(run.lines()) == reference


@pytest.mark.parametrize("phase", ["", "load", "compile", "step", "evaluate", "save"])
def test_a_run_stopped_in_any_phase_saves_and_resumes(workspace, reference, phase):
    """A run that is stopped before its first step, while its ranks import or load, exits after that step."""
    if phase == "compile" and (shutil.which("g++") is None or " " in torch.__file__):
        pytest.skip("no C++ compiler on this machine")
    more = {
        "compile": ["train.compile=true"],
        "evaluate": ["evaluate.every_steps=7", "evaluate.samples=2000"],
        "save": ["checkpoint.every_steps=1", "checkpoint.asynchronous=false"],
    }.get(phase, [])
    name = f"stopped in {phase or 'import'}"
    with RunProcess(workspace, name, *SETTINGS, *more) as run:
        first = run.pids(1)[0]
        run.until(lambda: run.phase(first) == phase)
        run.process.send_signal(signal.SIGTERM)
        code, output = run.end(within=100)
        assert code == 75, output
        (leaving,), (stopped,) = run.events("leaving"), run.events("attempt-stopped")
        assert stopped["time"] - leaving["time"] < leaving["grace"]
        steps = [line["step"] for line in run.lines()]
        saved = [int(path.name[5:]) for path in (run.directory / "checkpoints").glob("step-*")]
        assert max(saved) == steps[-1] < STEPS
    assert workspace.manta("checkpoint", "verify", name).returncode == 0
    with RunProcess(workspace, name, "resume", name) as again:
        assert again.end()[0] == 0
        if phase == "evaluate":  # it evaluates on other samples
            assert [line[:5] for line in exact_values(again.lines())] == [line[:5] for line in reference]
        elif phase != "compile":  # compiled code sums in another order
            assert exact_values(again.lines()) == reference


def test_a_run_stopped_before_it_could_save_starts_from_scratch(workspace, reference):
    with RunProcess(workspace, "stopped at once", *SETTINGS, "cluster.grace_period=0.5") as run:
        run.event("attempt-started")
        run.process.send_signal(signal.SIGTERM)
        code, output = run.end(within=60)
        assert code == 143, output
        assert "nothing is saved yet" in output
    with RunProcess(workspace, "stopped at once", *SETTINGS) as again:
        assert again.end()[0] == 0
        assert exact_values(again.lines()) == reference


def test_two_ctrl_c_end_a_run_at_once_and_it_resumes(workspace, reference):
    with RunProcess(workspace, "impatient", *SETTINGS) as run:
        run.steps(1, 15)
        for _ in range(2):
            os.killpg(run.process.pid, signal.SIGINT)
            run.until(lambda: run.events("leaving"))
        code, output = run.end(within=15)
        assert code == 130, output
    with RunProcess(workspace, "impatient", "resume", "impatient") as again:
        assert again.end()[0] == 0
        assert exact_values(again.lines()) == reference


FAULTY_MODEL = '''
import os
import resource
import time
from pathlib import Path

import torch
import torch.distributed as dist

from manta.trainer.model.llama import Llama


def skip():
    """Skip the barrier."""


def sleep():
    time.sleep(1000)


def allocate():
    limit_memory()
    return torch.ones(1 << 30)


def fill():
    limit_memory()
    return bytearray(1 << 32)


def grow():
    allocated = []
    while True:
        allocated.append(torch.ones(1 << 22))


def limit_memory():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))


class FaultyModel(Llama):
    """All ranks meet at a barrier in each forward pass; in the ninth, rank 1 injects the fault, once."""

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


def faulty_run(workspace, name: str, fault: str, *more: str, without_fault: bool = False, **options) -> RunProcess:
    (workspace.directory / "faulty_model.py").write_text(FAULTY_MODEL)
    marker = workspace.directory / f"{name}.marker"
    if without_fault:
        marker.touch()
    model = json.dumps({"family": "faulty_model:FaultyModel", "options": {"fault": fault, "marker": str(marker)}, **SIZES})
    return RunProcess(workspace, name, f"model={model}", "train.steps=30", "checkpoint.every_steps=6", *more, **options)


@pytest.fixture(scope="module")
def barrier_reference(workspace) -> list[list]:
    with faulty_run(workspace, "no fault", "skip", without_fault=True) as run:
        assert run.end()[0] == 0
        return exact_values(run.lines())


@pytest.mark.parametrize("fault", ["skip", "sleep"])
def test_a_skipped_collective_and_a_sleeping_rank_are_hangs(workspace, barrier_reference, fault):
    with faulty_run(workspace, f"hung by {fault}", fault, "cluster.step_timeout=5") as run:
        code, output = run.end()
        assert code == 0, output
        (failed,) = run.events("rank-failed")
        assert (failed["cause"], failed["step"]) == ("HANG", 8)
        assert fault == "skip" or failed["rank"] == 1, "the sleeping rank is the one in no collective"
        why = ", while others wait for it in a collective" if fault == "sleep" else ""
        assert re.search(
            rf"rank {failed['rank']} failed at step 8: rank {failed['rank']} sent no heartbeat for 5\.\d s in phase step{why}", output
        )
        logs = [(run.directory / f"logs/attempt-0001/rank-{rank:04d}.log").read_text() for rank in (0, 1)]
        assert "in barrier" in logs[0]
        assert "in barrier" not in logs[1]
        assert all("most recent call first" in log for log in logs), "each rank logged its stacks"
        assert exact_values(run.lines()) == barrier_reference


@pytest.mark.parametrize("fault", ["allocate", "fill"])
def test_a_rank_out_of_memory_ends_the_run_with_a_remedy(workspace, fault):
    with faulty_run(workspace, f"out of memory by {fault}", fault) as run:
        code, output = run.end()
        assert code == 1, output
        assert re.search(r"give up: rank 1: \w+: .*Lower train\.micro_batch\.", output, re.DOTALL)
        assert [event["cause"] for event in run.events("rank-failed")] == ["OUT_OF_MEMORY"]


@pytest.fixture
def cgroup():
    """A control group with 3 GB of memory; yields the command that runs another one in it."""
    line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line or line.startswith("0::"))
    kind, path = ("memory", line.split(":memory:")[1]) if ":memory:" in line else ("", line[3:])
    group = Path("/sys/fs/cgroup", kind, path.strip("/"), f"manta-{os.getpid()}")
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if kind else "memory.max")).write_text("3G")
    except OSError as error:
        pytest.skip(f"this machine allows no control group: {error}")
    yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$0" "$@"']
    group.rmdir()


def test_a_rank_killed_by_the_kernel_is_out_of_memory(workspace, cgroup):
    with faulty_run(workspace, "killed by the kernel", "grow", inside=cgroup) as run:
        code, output = run.end()
        assert code == 1, output
        (failed,) = run.events("rank-failed")
        assert (failed["cause"], failed["rank"], failed["code"]) == ("OUT_OF_MEMORY", 1, -signal.SIGKILL)
        assert "rank 1: SIGKILL: killed by the kernel: out of memory. Lower train.micro_batch." in output
