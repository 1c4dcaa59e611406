"""A run that is under way, watched and hurt from outside: what the tests of faults share."""

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
MARK = "MANTA_TEST_RUN"  # in the environment of all that a run starts, whoever starts it


def until(what: Callable[[], Any], *, within: float = 120.0, or_say: Callable[[], object] = lambda: "it never came") -> Any:
    deadline = time.monotonic() + within
    while not (found := what()):
        assert time.monotonic() < deadline, or_say()
        time.sleep(0.02)
    return found


class LiveRun:
    """`manta`, in a session of its own: a signal to its group is what a terminal would send. As a context it leaves nothing behind."""

    def __init__(self, workspace: Workspace, name: str, *arguments: str, inside: Sequence[str] = (), **environment: str) -> None:
        """inside: what the command is to be run by. arguments: overrides of the workspace's config, or a command of its own."""
        self.home, self.mark = workspace.directory / name, token_hex(8)
        self.said = workspace.directory / f"{name}.stderr"
        command = arguments if arguments[:1] == ("resume",) else ("train", str(workspace.config_file), f"run.dir={name}", *arguments)
        there = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", MARK: self.mark} | environment
        with self.said.open("a") as said:
            self.process = subprocess.Popen(
                [*inside, str(MANTA), *command], cwd=workspace.directory, env=there, stdout=said, stderr=said, start_new_session=True
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
        events = read_events(self.home / "events.jsonl")
        return [event for event in events if event["event"] == kind and attempt in {None, event["attempt"]}]

    def event(self, kind: str, attempt: int = 1, *, within: float = 120.0) -> dict:
        return self.until(lambda: self.events(kind, attempt), within=within)[0]

    def until(self, what: Callable[[], Any], *, within: float = 120.0) -> Any:
        """While it runs."""

        def looked() -> Any:
            found = what()
            assert found or self.process.poll() is None, f"it ended: {self.story()}"
            return found

        return until(looked, within=within, or_say=self.story)

    def story(self) -> str:
        return f"{self.said.read_text()}\n{json.dumps(read_events(self.home / 'events.jsonl')[-12:], indent=1)}"

    def steps(self, attempt: int, count: int) -> None:
        """Waits for so many of an attempt."""
        file = self.home / "metrics.jsonl"
        self.until(lambda: file.exists() and sum(line["attempt"] == attempt for line in parse_lines(file.read_text())) >= count)

    def pids(self, attempt: int) -> list[int]:
        """Of the ranks, in order."""
        return [rank["pid"] for rank in self.event("attempt-started", attempt)["ranks"]]

    def phase(self, pid: int) -> str:
        """Where a rank is: as its heartbeat, which it holds open, says."""
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError, ValueError):
                if "/heartbeat-" in str(link.readlink()):
                    return json.loads(link.read_bytes())["phase"]
        return ""

    def processes(self) -> dict[int, str]:
        """All that is left of it but itself, Ray's own among them: pid -> command line."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes() and int(entry.name) != self.process.pid:
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")[:150]
        return found

    def pid_of(self, *words: str) -> int:
        """Of the one process in whose command line all of these stand."""
        (pid,) = [pid for pid, command in self.whole_commands().items() if all(word in command for word in words)]
        return pid

    def whole_commands(self) -> dict[int, str]:
        found = {}
        for pid in self.processes():
            with suppress(FileNotFoundError, ProcessLookupError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        return found

    def end(self, *, within: float = 200.0) -> tuple[int, str]:
        """The exit code, and all that was said. No process may be left."""
        try:
            code = self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.story()) from None
        assert self.processes() == {}
        return code, self.said.read_text()

    def lines(self) -> list[dict]:
        """The true one of each step."""
        return read_metrics(self.home / "metrics.jsonl")


def undisturbed(workspace: Workspace, name: str, *overrides: str) -> list[dict]:
    """What a run writes that nobody hurts."""
    with LiveRun(workspace, name, *overrides) as run:
        code, told = run.end()
        assert code == 0, told
        return run.lines()


def exactly(lines: Sequence[dict]) -> list[list[Any]]:
    """What has to be the same, bit by bit, where the layout is."""
    return [[line.get(key) for key in EXACT] for line in lines]


def nearly(lines: Sequence[dict], others: Sequence[dict]) -> None:
    """The same samples at each step, and the same losses but for the order in which ranks add."""
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    assert [line["data/digest"] for line in lines] == [line["data/digest"] for line in others]
    for line, other in zip(lines, others, strict=True):
        assert abs(line["train/loss"] - other["train/loss"]) < 1e-5, line["step"]
