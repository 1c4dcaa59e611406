"""What a supervisor and a rank agree on: exit codes, environment variables, the heartbeat file, the error file, and how files are read
that may be damaged or replaced.

The leaf of `manta.cluster`: it imports no other module of manta, so that a rank can import it without the rest of the package.
"""

import errno
import functools
import json
import logging
import os
import re
import resource
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
log = logging.getLogger(__name__)
LONGEST_LINE = 1 << 20  # bytes of a line of JSON; a longer one is damaged
MAX_MESSAGE, MAX_TRACEBACK = 10_000, 100_000  # characters of an error
HEARTBEAT_SIZE = 256  # bytes: one write, padded with spaces, so that a shorter heartbeat fully overwrites a longer one

PENDING_COLLECTIVE = re.compile(r"^process group .* is pending$", re.MULTILINE)  # in a rank's log, see collective_line

RankPhase = Literal["start", "load", "restore", "read", "compile", "step", "evaluate", "save", "done"]
Category = Literal["exception", "out_of_memory", "input", "unrecoverable", "spike"]


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
    RUNNING = 3
    """Of `manta status --exit-code` alone: the run has not ended."""
    KILLED = 4
    """Of `manta status --exit-code` alone: it ended without saying so, killed with its machine, for example. Run it again to resume."""


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
    `unwritten`: bytes of metrics that wait for room on the disk; `disk_error`: the error's number.
    """

    step: int
    phase: RankPhase | Literal[""]
    time: float
    resumed_from: int | None = None
    work: float = 0.0
    unwritten: int = 0
    disk_error: int = 0

    @property
    def has_stepped(self) -> bool:
        """Whether the rank has finished a step since it started, or had none to do."""
        return self.phase == "done" or (self.resumed_from is not None and self.step > self.resumed_from)


def deny_writes_by_others() -> None:
    """Set the process's umask so that new files are only its user's to write, even if the umask before denied nothing.

    A umask that lets only the group write was chosen for a group that works together: it stays.
    """
    umask = os.umask(0o077)
    os.umask(umask if umask & 0o002 else umask | 0o022)


_HEARTBEAT, _ERROR = TypeAdapter(Heartbeat), TypeAdapter(RankError)


def write_error(path: Path, error: RankError) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(asdict(error)), encoding="utf-8")
    new.replace(path)


def read_error(path: Path) -> RankError | None:
    """Return the error that a rank wrote; None if it wrote none, died while writing, or the file cannot be read."""
    try:
        with open_regular(path) as file:
            return _ERROR.validate_json(file.read(LONGEST_LINE))
    except (OSError, ValidationError):
        return None


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError if it is not a regular file: to open a named pipe, for example, would wait for ever."""
    return open(path, "rb", opener=_open_regular)


def read_lines(file: BinaryIO, parse: Callable[[bytes], T], *, path: Path, start: int = 0) -> Iterator[T]:
    """Yield what `parse` makes of each complete line. Lines for which it raises ValueError are skipped, and the first one is logged.

    path, start: the file's path, and the byte of it at which `file` starts, to name the line.
    """
    first_damaged, damaged = "", 0
    for number, line in enumerate(_complete_lines(file, path), start=1):
        try:
            yield parse(line)
        except (ValueError, RecursionError) as error:  # RecursionError: of JSON that is nested too deeply
            damaged += 1
            first_damaged = first_damaged or f"{path}:{_lines_before(path, start) + number}: {_problem(error)}"
    if damaged:
        _warn_once(f"{first_damaged}. The line is skipped" + (f", as are {damaged - 1:,} more." if damaged > 1 else "."))


def raise_open_files_limit() -> None:
    """Raise the limit of open files as far as this process may: 1024 are too few for many sources and ranks."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def collective_line(group: str, *, number: int, collective: str, is_done: bool) -> str:
    """Describe the newest collective of a process group, for the log of a rank that was asked for its stack traces."""
    return f"process group {group}: collective {number}, {collective}, is {'done' if is_done else 'pending'}"


class HeartbeatWriter:
    """Reports this rank's progress to its supervisor; without a supervisor (`path` is None), writes nothing."""

    def __init__(self, path: str | None) -> None:
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        self.is_supervised = path is not None
        self.step = 0
        self.phase: RankPhase = "start"
        self.resumed_from: int | None = None
        self.work, self.unwritten, self.disk_error = 0.0, 0, 0  # see Heartbeat
        self._seconds, self._since = dict[str, float](), time.monotonic()

    def __call__(self, phase: RankPhase, step: int) -> None:
        """Report the phase, and the number of finished optimizer steps."""
        self._seconds, self._since = self.seconds(), time.monotonic()
        self.step, self.phase = step, phase
        if self.resumed_from is None and phase not in {"start", "load", "restore"}:
            self.resumed_from = step
        if self._file is not None:
            progress = {"step": step, "phase": phase, "resumed_from": self.resumed_from, "work": round(self.work, 6)}
            disk = {"unwritten": self.unwritten, "disk_error": self.disk_error}
            heartbeat = json.dumps({**progress, **disk, "time": time.monotonic()})
            os.pwrite(self._file, heartbeat.ljust(HEARTBEAT_SIZE).encode(), 0)

    def seconds(self) -> dict[str, float]:
        """Return how long this rank has been in each phase, since it started."""
        return {**self._seconds, self.phase: self._seconds.get(self.phase, 0.0) + time.monotonic() - self._since}


def reserve_heartbeat(path: Path) -> None:
    """Make the file at its full size, or blank it, so that heartbeats need no room on the disk. Raises OSError if there is none."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(file, b" " * HEARTBEAT_SIZE, 0)
    finally:
        os.close(file)


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
            with open_regular(self._path) as file:
                heartbeat = _HEARTBEAT.validate_json(file.read(HEARTBEAT_SIZE))
        except (OSError, ValidationError):  # not written yet, or torn
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


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor


def _complete_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield each line that ends; one that is too long as an empty one. The memory that it takes is limited. Raises OSError."""
    is_start = True
    while True:
        try:
            piece = file.readline(LONGEST_LINE)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None  # its message names the file
        if not piece:
            return
        if piece.endswith(b"\n"):
            yield piece if is_start else b""
        is_start = piece.endswith(b"\n")


def _lines_before(path: Path, start: int) -> int:
    count = 0
    with open_regular(path) as file:
        while start > 0 and (block := file.read(min(start, LONGEST_LINE))):
            count, start = count + block.count(b"\n"), start - len(block)
    return count


def _problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "expected JSON that the run wrote, got something else"
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(map(str, first["loc"]))
    return f"{key or 'line'}: expected what the run wrote, got an error: {first['msg']}"[:300]


@functools.lru_cache(maxsize=100)  # some files are read again and again
def _warn_once(message: str) -> None:
    log.warning("%s", message)
