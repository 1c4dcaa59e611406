"""Goodput of a real run against a stopwatch of the test's own: a frozen and a killed rank, a lost node, a stop, a resume an hour later."""

import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from run_process import RunProcess

from manta.cluster.supervise.event_log import parse_event, read_events
from manta.cluster.tail import Tail
from manta.launch.goodput import Category, goodput, spans
from manta.trainer.metrics import parse_line, read_all_metrics

pytestmark = pytest.mark.slow
SETTINGS = (
    "train.steps=100000",
    "schedule.shape=constant",
    "checkpoint.every_steps=200",
    "evaluate.every_steps=50",
    "evaluate.samples=64",
    "cluster.nodes=2..2",
    "cluster.ranks_per_node=1",
)
HOUR = 3600.0
NEAR = 0.5  # seconds
FROZEN = 2.0  # seconds
FREEZES = {"save": Category.SAVE, "evaluate": Category.EVALUATION, "read": Category.DATA, "step": Category.SLOW}


class Stopwatch(threading.Thread):
    """Notes by a monotonic clock when each event and line can first be read, and samples the phase of rank 0.

    It reads none of the times that the run has logged.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(daemon=True)
        self._directory, self._ended = directory, threading.Event()
        self._pid, self._attempt, self._heartbeat = 0, 0, Path()
        self.events, self.lines = list[tuple[float, dict]](), list[tuple[float, dict]]()
        self.entered, self.spent = dict[tuple[int, str], float](), dict[tuple[int, str], float]()  # by attempt and phase

    def run(self) -> None:
        events, metrics = Tail(self._directory / "events.jsonl"), Tail(self._directory / "metrics.jsonl")
        before = time.monotonic()
        while not self._ended.wait(0.004):
            now, key = time.monotonic(), (self._attempt, self._phase())
            self.entered.setdefault(key, now)
            self.spent[key] = self.spent.get(key, 0.0) + now - before
            before = now
            for event in events.lines(parse_event):
                self.events.append((now, event))
                if event["event"] == "attempt-started":
                    self._pid, self._attempt, self._heartbeat = event["ranks"][0]["pid"], event["attempt"], Path()
            for batch in metrics.batches(parse_line):
                self.lines += [(now, line) for line in batch]

    def close(self) -> None:
        self._ended.set()
        self.join()

    def _phase(self) -> str:
        if not (phase := phase_in(self._heartbeat)) and self._pid:
            self._heartbeat = heartbeat_of(self._pid)
        return phase

    def event(self, kind: str, attempt: int) -> float:
        """Return when the first event of this kind and attempt was there."""
        return next(when for when, event in self.events if (event["event"], event["attempt"]) == (kind, attempt))

    def waited(self, attempt: int) -> float:
        """Return the seconds that the run waited for nodes after an attempt."""
        return self.event("nodes-gathered", attempt) - self.event("waiting", attempt)

    def recomputed(self, attempt: int, failed: float) -> float:
        """Return the seconds from the checkpoint from which the next attempt resumed to the failure."""
        step = next(event["step"] for _, event in self.events if (event["event"], event["attempt"]) == ("loaded", attempt + 1))
        return failed - next(when for when, line in self.lines if (line["attempt"], line["step"]) == (attempt, step))


def heartbeat_of(pid: int) -> Path:
    with suppress(FileNotFoundError):
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                if "/heartbeat-" in str(link.readlink()):
                    return link
    return Path()


def phase_in(heartbeat: Path) -> str:
    with suppress(OSError, ValueError):
        return json.loads(heartbeat.read_bytes())["phase"]
    return ""


def freeze(run: RunProcess, phase: str, attempt: int) -> tuple[float, float]:
    """Freeze rank 0 in a phase. Return when it stopped and when it continued."""
    pid = run.pids(attempt)[0]
    heartbeat = heartbeat_of(pid)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if phase_in(heartbeat) != phase:
            continue
        start = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
            pass
        was_in_time = phase_in(heartbeat) == phase
        time.sleep(FROZEN if was_in_time else 0.0)
        os.kill(pid, signal.SIGCONT)
        if was_in_time:
            return start, time.monotonic()
    raise AssertionError(f"rank 0 was never seen in phase {phase}: {run.story()}")


def past_a_checkpoint(run: RunProcess, attempt: int) -> None:
    """Wait until the attempt has done steps for two seconds that are in no checkpoint."""
    checkpoints = run.directory / "checkpoints"
    before = set(checkpoints.glob("step-*"))
    run.until(lambda: set(checkpoints.glob("step-*")) - before)
    time.sleep(2)
    assert run.lines()[-1]["attempt"] == attempt


def kill_node(run: RunProcess, address: str) -> float:
    """Kill the program that starts its raylet, the raylet, its agents and its ranks. The run then starts the program again."""
    raylet = psutil.Process(run.pid_of("/raylet --", f"--node_ip_address={address} "))
    host = raylet.parent()
    processes = [host, *host.children(recursive=True)]
    when = time.monotonic()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return when


def set_back(file: Path, seconds: float) -> None:
    """Move all times in a log into the past."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line | {"time": line["time"] - seconds}) + "\n" for line in lines))


def test_each_injected_loss_is_in_its_category_as_a_stopwatch_measures_it(workspace):
    name = "by the stopwatch"
    first = Stopwatch(workspace.directory / name)
    first.start()
    with RunProcess(workspace, name, *SETTINGS) as run:
        run.steps(1, 20)
        freezes = {phase: freeze(run, phase, 1) for phase in FREEZES}
        past_a_checkpoint(run, 1)
        killed = time.monotonic()
        os.kill(run.pids(1)[1], signal.SIGKILL)
        run.steps(2, 20)
        past_a_checkpoint(run, 2)
        lost = kill_node(run, "127.0.0.4")
        run.steps(3, 20)
        stopped = time.monotonic()
        run.process.send_signal(signal.SIGTERM)
        code, output = run.end(within=60)
        assert code == 75, output
    first.close()
    for file in ("events.jsonl", "metrics.jsonl"):
        set_back(run.directory / file, HOUR)
    second = Stopwatch(run.directory)
    with RunProcess(workspace, name, "resume", name) as run:
        run.until(lambda: len(run.events("run-started")) == 2)
        second.start()
        run.steps(4, 20)
        run.process.send_signal(signal.SIGTERM)
        assert run.end(within=60)[0] == 75
    second.close()

    events, lines = read_events(run.directory / "events.jsonl"), read_all_metrics(run.directory / "metrics.jsonl")
    found, parts = goodput(events, lines), spans(events, lines)

    def near(seconds: float) -> object:
        return pytest.approx(seconds, abs=NEAR)

    total = second.event("run-ended", 4) - first.event("run-started", 0)  # without the hour
    assert found.total - HOUR == pytest.approx(total, rel=0.01)
    assert sum(found.seconds.values()) - HOUR == pytest.approx(total, rel=0.01)
    assert min(found.seconds.values()) >= 0
    epoch = time.time() - time.monotonic() - HOUR  # of the first part
    for phase, (start, end) in freezes.items():
        (part,) = [part for part in parts if part.start <= epoch + (start + end) / 2 < part.end]
        assert part.seconds[FREEZES[phase]] == near(end - start), phase
    last = [part for part in parts if part.attempt == 3][-1]
    assert last.seconds == {Category.SAVE: near(first.event("attempt-stopped", 3) - stopped)}

    watches = {1: first, 2: first, 3: first, 4: second}
    starts = {1: first.event("run-started", 0), 4: second.event("run-started", 3)}
    ends = {3: first, 4: second}
    failures = {1: killed, 2: lost}
    assert found.seconds == found.seconds | {
        Category.START: near(
            sum(watches[attempt].entered[attempt, "restore"] - since for attempt, since in starts.items())
            + sum(watch.event("run-ended", attempt) - watch.event("attempt-stopped", attempt) for attempt, watch in ends.items())
            - first.waited(0)
            - second.waited(3)
        ),
        Category.NODES: near(first.waited(0) + first.waited(2) + second.waited(3)),
        Category.RESTART: near(sum(first.entered[attempt + 1, "restore"] - since for attempt, since in failures.items()) - first.waited(2)),
        Category.RESTORE: near(sum(watch.spent[attempt, "restore"] for attempt, watch in watches.items())),
        Category.RECOMPUTED: near(sum(first.recomputed(attempt, failed) for attempt, failed in failures.items())),
        Category.STOPPED: near(second.event("run-started", 3) - first.event("run-ended", 3) + HOUR),
    }
