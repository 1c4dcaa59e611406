"""What a supervisor and a rank agree on: exit codes, environment variables, the heartbeat file and the error file.

The leaf of `manta.cluster`: it imports no other module of manta, so that a rank can import it without the rest of the package.
"""

import json
import os
import re
import time
from dataclasses import asdict, dataclass
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

HEARTBEAT_SIZE = 256  # bytes: one write, padded with spaces, so that a shorter heartbeat fully overwrites a longer one

PENDING_COLLECTIVE = re.compile(r"^process group .* is pending$", re.MULTILINE)  # in a rank's log, see collective_line

RankPhase = Literal["start", "load", "read", "compile", "step", "evaluate", "save", "done"]
Category = Literal["exception", "out_of_memory", "input", "unrecoverable"]


class ExitCode(IntEnum):
    """The exit codes of a rank and of `manta train`."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    """A wrong command, config or input."""
    SAVED = 75
    """Stop requested, checkpoint saved: run it again to resume."""
    INTERRUPTED = 130
    """Stop requested by Ctrl-C."""
    UNSAVED = 143
    """Stop requested, checkpoint not saved."""


class Env(StrEnum):
    """The environment variables that a supervisor sets for a rank, in addition to those that torchrun sets."""

    ATTEMPT = "MANTA_ATTEMPT"
    """How many times the run has been started, this one included."""
    ERROR_FILE = "MANTA_ERROR"
    HEARTBEAT_FILE = "MANTA_HEARTBEAT"
    LAYOUT = "MANTA_LAYOUT"
    """The trainer's layout of the ranks, computed once per attempt."""
    LOG_FILE = "MANTA_LOG"
    STANDBY = "MANTA_STANDBY"
    """Set: import everything, then read the other variables from standard input, as one line of JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankError:
    """Why a rank failed. `step` and `phase`: its last heartbeat."""

    type: str
    message: str
    traceback: str = ""
    step: int = 0
    phase: str = ""
    category: Category = "exception"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """`step` counts finished optimizer steps; `time` is the rank's monotonic clock; `phase` is "" before the first heartbeat.

    `resumed_from`: the step that the rank trains on from, 0 in a new run; None until it is known.
    `work`: seconds of the last step that the rank spent on its own, not waiting for other ranks; 0 if unknown.
    """

    step: int
    phase: RankPhase | Literal[""]
    time: float
    resumed_from: int | None = None
    work: float = 0.0

    @property
    def has_stepped(self) -> bool:
        """Whether the rank has finished a step since it started, or had none to do."""
        return self.phase == "done" or (self.resumed_from is not None and self.step > self.resumed_from)


def deny_writes_by_others() -> None:
    """Set the process's umask so that new files are only its user's to write, even if the umask before denied nothing.

    A umask that lets the group write, and nobody else, was chosen for a group that works together: it stays.
    """
    umask = os.umask(0o077)
    os.umask(umask if umask & 0o002 else umask | 0o022)


_HEARTBEAT, _ERROR = TypeAdapter(Heartbeat), TypeAdapter(RankError)


def write_error(path: Path, error: RankError) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(asdict(error)))
    new.replace(path)


def read_error(path: Path) -> RankError | None:
    """Return the error that a rank wrote; None if it wrote none, or died while writing."""
    try:
        return _ERROR.validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def collective_line(group: str, *, number: int, collective: str, is_done: bool) -> str:
    """Describe the newest collective of a process group, for the log of a rank that was asked for its stack traces."""
    return f"process group {group}: collective {number}, {collective}, is {'done' if is_done else 'pending'}"


class HeartbeatWriter:
    """Reports this rank's progress to its supervisor; without a supervisor (`path` is None), writes nothing."""

    def __init__(self, path: str | None) -> None:
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self.is_supervised = path is not None
        self.step = 0
        self.phase: RankPhase = "start"
        self.resumed_from: int | None = None
        self.work = 0.0  # see Heartbeat.work

    def __call__(self, phase: RankPhase, step: int) -> None:
        """Report the phase, and the number of finished optimizer steps."""
        self.step, self.phase = step, phase
        if self.resumed_from is None and phase not in {"start", "load"}:
            self.resumed_from = step
        if self._file is not None:
            progress = {"step": step, "phase": phase, "resumed_from": self.resumed_from}
            heartbeat = json.dumps({**progress, "time": time.monotonic(), "work": round(self.work, 6)})
            os.pwrite(self._file, heartbeat.ljust(HEARTBEAT_SIZE).encode(), 0)


class HeartbeatReader:
    """Follows one rank: its last valid heartbeat, and when that changed by the reader's own clock.

    The file has no lock. A torn read is not valid JSON and is ignored.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = time.monotonic()
        self.last = Heartbeat(step=0, phase="", time=0.0)
        # Intervals between two heartbeats in phase "step", without the first step's: how many, and the longest, in seconds.
        self.intervals, self.longest = 0, 0.0

    def read(self) -> Heartbeat:
        try:
            heartbeat = _HEARTBEAT.validate_json(self._path.read_bytes()[:HEARTBEAT_SIZE])
        except (FileNotFoundError, ValidationError):  # not written yet, or torn
            return self.last
        if heartbeat != self.last:
            if self.last.has_stepped and self.last.phase == heartbeat.phase == "step":
                self.intervals, self.longest = self.intervals + 1, max(self.longest, self.silent_seconds)
            self.last, self._changed = heartbeat, time.monotonic()
        return self.last

    @property
    def silent_seconds(self) -> float:
        """Seconds since the heartbeat last changed."""
        return time.monotonic() - self._changed
