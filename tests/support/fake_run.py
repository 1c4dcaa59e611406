"""A run of fake ranks under a real controller, in its own process, observed from outside."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from manta.cluster.supervise.event_log import read_events

SUPPORT = Path(__file__).parent
PYTHON = sys.executable


class FakeRun:
    def __init__(self, directory, plan, *, cluster=None, cwd=None, program=None, sizes=(2,)):
        """plan: what fake_rank.py does."""
        self.directory = directory
        directory.mkdir(exist_ok=True)
        plan = {**plan, "run": str(directory)}  # `processes` finds it in their environment
        program = program or ["-P", str(SUPPORT / "fake_rank.py")]
        with (directory / "controller.log").open("w") as output:
            self.process = subprocess.Popen(
                [PYTHON, "-P", "-W", "error", str(SUPPORT / "fake_run_controller.py"), str(directory), *program],
                env={
                    **os.environ,
                    "CUDA_VISIBLE_DEVICES": "0,1",
                    "FAKE": json.dumps(plan),
                    "CLUSTER": json.dumps(cluster or {}),
                    "SIZES": json.dumps(sizes),
                },
                cwd=cwd,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a signal to its group is what a terminal would send
            )

    def events(self):
        return read_events(self.directory / "events.jsonl")

    def event(self, kind, attempt=1, *, within=30.0):
        """Wait for an event."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            for event in self.events():
                if (event["event"], event["attempt"]) == (kind, attempt):
                    return event
            assert self.process.poll() is None, f"no {kind} in attempt {attempt}: {self.events()} {self.output()}"
            time.sleep(0.02)
        raise AssertionError(f"no {kind} in attempt {attempt}: {self.events()}")

    def pids(self, attempt=1):
        return [rank["pid"] for rank in self.event("attempt-started", attempt)["ranks"]]

    def signal(self, number):
        os.killpg(self.process.pid, number)

    def end(self, within=30.0):
        """Wait for the exit code. No process of the run may remain."""
        code = self.process.wait(within)
        remaining = self.processes()
        assert not remaining, remaining
        return code

    def output(self):
        return (self.directory / "controller.log").read_text()

    def log(self, attempt, rank):
        return (self.directory / f"logs/attempt-{attempt:04d}/rank-{rank:04d}.log").read_text()

    def rank_environment(self, attempt=1, rank=0):
        line = next(line for line in self.log(attempt, rank).splitlines() if line.startswith("environment "))
        return json.loads(line.removeprefix("environment "))

    def processes(self):
        """Every living process of the run, Ray's included: pid -> command line."""
        commands = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.directory).encode() in (entry / "environ").read_bytes() and int(entry.name) != self.process.pid:
                    commands[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return commands

    def ranks(self):
        """Ranks and standby processes."""
        return {pid for pid, command in self.processes().items() if "fake_rank" in command and "die_with_parent" not in command}

    def agent(self, attempt=1):
        """The agent that has the ranks of an attempt; a standby agent is another one."""
        (pid,) = {psutil.Process(rank).ppid() for rank in self.pids(attempt)}
        assert self.processes()[pid].startswith("ray::NodeAgent")
        return pid

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
