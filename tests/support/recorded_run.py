"""A run directory as a run with a killed rank leaves it: steps 1 to 9, then again from step 7 on, to the end. Lines can be appended."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runs import METRICS

from manta.cluster.supervise.event_log import read_events
from manta.launch.config import load
from manta.trainer.run_directory import RunDirectory

CONFIG = """
run: {dir: unused}
data: {sources: ["stdlib:"], sequence_length: 32}
model: {preset: llama-tiny}
train: {steps: 12, global_batch: 8, micro_batch: 4}
cluster: {environment: {NOTE: hidden}}
"""
START = 1.7e9  # seconds since the epoch


class RecordedRun:
    def __init__(self, directory: Path, *overrides: str) -> None:
        directory.mkdir()
        (directory.parent / "run.yaml").write_text(CONFIG)
        config = load(directory.parent / "run.yaml", [f"run.dir={json.dumps(str(directory))}", *overrides])
        (directory / "config.yaml").write_text(config.to_yaml())
        (directory / "manifest.json").write_text("{}")
        (directory / "logs").mkdir()
        self.directory, self.run_dir = directory, RunDirectory(directory)
        self.lines = list[dict]()

    def steps(self, attempt: int, first: int, last: int) -> None:
        for step in range(first, last + 1):
            line = {
                **METRICS,
                "step": step,
                "attempt": attempt,
                "time": START + 20 * attempt + step,
                "train/loss": 6 - step / 8 - attempt / 64,
            }
            line |= {"tokens": 256 * step, "learning_rate": 1e-3, "seconds": {"step": 0.5 * step}, "skipped": False}
            self.append("metrics.jsonl", line | ({"eval/loss": 5.5} if step % 5 == 0 else {}))
            self.lines.append(json.loads((self.directory / "metrics.jsonl").read_bytes().splitlines()[-1]))

    def event(self, kind: str, attempt: int = 1, **details: object) -> None:
        when = max([START + 20 * attempt, *(line["time"] for line in self.lines)])
        self.append("events.jsonl", {"time": when, "event": kind, "attempt": attempt, **details})

    def append(self, name: str, line: object) -> None:
        with (self.directory / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def events(self) -> list[dict]:
        return read_events(self.run_dir.events_file)

    def to_the_kill(self) -> None:
        self.event("run-started", 0)
        self.event("attempt-started", 1, ranks=[])
        self.steps(1, 1, 9)

    def to_the_end(self) -> None:
        self.event("rank-failed", 1, rank=1, cause="SIGNAL", step=9, message="killed by SIGKILL | see http://me:secret@host/x")
        self.event("decided", 1, decision="restart", after=0)
        self.event("attempt-started", 2, ranks=[])
        self.event("loaded", 2, step=6)
        self.steps(2, 7, 12)
        self.event("run-ended", 2, exit_code=0)

    def valid(self, key: str) -> dict[int, float]:
        """Return the values by step: of each step its last."""
        return {line["step"]: line[key] for line in self.lines if key in line}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the lock, as a controller does."""
        with self.run_dir.lock_file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
