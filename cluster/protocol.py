"""How far is a rank? It overwrites one small file; its agent reads it. No lock: a torn read is told by its JSON and passed over."""

import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from manta.cluster.supervise.failure import BEFORE_THE_FIRST_STEP

SIZE = 256  # bytes: one pwrite, padded with spaces, so that a shorter beat leaves no rest of a longer one


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """`step` counts finished optimizer steps; `time` is the rank's monotonic clock; `phase` is "" before the first beat.

    `work`: seconds of the last step that the rank spent by itself; 0 where that is not known.
    """

    step: int
    phase: str
    time: float
    work: float = 0.0


_ADAPTER = TypeAdapter(Heartbeat)


class HeartbeatReader:
    """Follows one rank: its last good beat, and when that last changed by the reader's own clock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = time.monotonic()
        self._first_step: int | None = None  # a resumed rank does not begin at 0
        self.last = Heartbeat(step=0, phase="", time=0.0)
        self.intervals, self.longest = 0, 0.0  # between two beats in phase "step", the first step's left out: how many, and seconds

    def read(self) -> Heartbeat:
        try:
            beat = _ADAPTER.validate_json(self._path.read_bytes()[:SIZE])
        except (FileNotFoundError, ValidationError):  # not written yet, or torn
            return self.last
        if beat != self.last:
            if self.has_stepped and self.last.phase == beat.phase == "step":
                self.intervals, self.longest = self.intervals + 1, max(self.longest, self.quiet)
            self.last, self._changed = beat, time.monotonic()
        if self._first_step is None and beat.phase not in BEFORE_THE_FIRST_STEP:
            self._first_step = beat.step
        return self.last

    @property
    def quiet(self) -> float:
        """Seconds since the beat last changed."""
        return time.monotonic() - self._changed

    @property
    def has_stepped(self) -> bool:
        """Whether this process has finished a step of its own (or had none to do)."""
        return self.last.phase == "done" or (self._first_step is not None and self.last.step > self._first_step)
