"""A `manta` process that tests watch and disturb from outside."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Self

from conftest import MANTA, Workspace

from manta.cluster.supervise.event_log import read_events
from manta.trainer.metrics import parse_lines, read_metrics

EXACT = ("step", "train/loss", "grad_norm", "learning_rate", "data/digest", "eval/loss")
MARK = "MANTA_TEST_RUN"  # in the environment of every process of a run


def until(what: Callable[[], Any], *, within: float = 120.0, report: Callable[[], object] = lambda: "timed out") -> Any:
    deadline = time.monotonic() + within
    while not (found := what()):
        assert time.monotonic() < deadline, report()
        time.sleep(0.02)
    return found


class RunProcess:
    """A `manta` command in its own session, so that a signal to its process group is like one from a terminal.

    Leaving the context kills all its processes.
    """

    def __init__(self, workspace: Workspace, name: str, *arguments: str, inside: Sequence[str] = (), **environment: str) -> None:
        """inside: a command that runs it. arguments: overrides of the workspace's config, or `resume` with its arguments."""
        self.directory, self.mark = workspace.directory / name, token_hex(8)
        self.stderr = workspace.directory / f"{name}.stderr"
        command = arguments if arguments[:1] == ("resume",) else ("train", str(workspace.config_file), f"run.dir={name}", *arguments)
        environ = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", MARK: self.mark} | environment
        with self.stderr.open("a") as stderr:
            self.process = subprocess.Popen(
                [*inside, str(MANTA), *command], cwd=workspace.directory, env=environ, stdout=stderr, stderr=stderr, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def events(self, kind: str, attempt: int | None = None) -> list[dict]:
        events = read_events(self.directory / "events.jsonl")
        return [event for event in events if event["event"] == kind and attempt in {None, event["attempt"]}]

    def event(self, kind: str, attempt: int = 1, *, within: float = 120.0) -> dict:
        return self.until(lambda: self.events(kind, attempt), within=within)[0]

    def until(self, what: Callable[[], Any], *, within: float = 120.0) -> Any:
        """Wait for a condition while the command runs."""

        def check() -> Any:
            found = what()
            assert found or self.process.poll() is None, f"the command ended: {self.story()}"
            return found

        return until(check, within=within, report=self.story)

    def story(self) -> str:
        return f"{self.stderr.read_text()}\n{json.dumps(read_events(self.directory / 'events.jsonl')[-12:], indent=1)}"

    def steps(self, attempt: int, count: int) -> None:
        """Wait until an attempt has logged `count` steps."""
        file = self.directory / "metrics.jsonl"
        self.until(lambda: file.exists() and sum(line["attempt"] == attempt for line in parse_lines(file.read_text())) >= count)

    def pids(self, attempt: int) -> list[int]:
        """Return the process ids of the ranks, in order."""
        return [rank["pid"] for rank in self.event("attempt-started", attempt)["ranks"]]

    def phase(self, pid: int) -> str:
        """Return the phase in a rank's heartbeat, a file that it keeps open."""
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError, ValueError):
                if "/heartbeat-" in str(link.readlink()):
                    return json.loads(link.read_bytes())["phase"]
        return ""

    def processes(self) -> dict[int, str]:
        """Return pid -> command line of all its processes but the command itself, Ray's included."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes() and int(entry.name) != self.process.pid:
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")[:150]
        return found

    def pid_of(self, *words: str) -> int:
        """Return the id of the one process with all these words in its command line."""
        (pid,) = [pid for pid, command in self.command_lines().items() if all(word in command for word in words)]
        return pid

    def command_lines(self) -> dict[int, str]:
        found = {}
        for pid in self.processes():
            with suppress(FileNotFoundError, ProcessLookupError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        return found

    def end(self, *, within: float = 200.0) -> tuple[int, str]:
        """Return the exit code and the output. No process may be left."""
        try:
            code = self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.story()) from None
        assert self.processes() == {}
        return code, self.stderr.read_text()

    def lines(self) -> list[dict]:
        """Return the valid metrics line of each step."""
        return read_metrics(self.directory / "metrics.jsonl")


def run_undisturbed(workspace: Workspace, name: str, *overrides: str) -> list[dict]:
    """Return the metrics of a run without faults."""
    with RunProcess(workspace, name, *overrides) as run:
        code, output = run.end()
        assert code == 0, output
        return run.lines()


def exact_values(lines: Sequence[dict]) -> list[list[Any]]:
    """Return the values that must be bitwise the same under the same layout."""
    return [[line.get(key) for key in EXACT] for line in lines]


def assert_nearly_same(lines: Sequence[dict], others: Sequence[dict]) -> None:
    """Assert the same samples at each step, and the same losses up to the order in which ranks add."""
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    assert [line["data/digest"] for line in lines] == [line["data/digest"] for line in others]
    for line, other in zip(lines, others, strict=True):
        assert abs(line["train/loss"] - other["train/loss"]) < 1e-5, line["step"]
