"""The one value that travels upward: which step, which phase, when. A supervisor reads the file; alone, nothing is written."""

import json
import os
import time
from typing import Literal, Self

Phase = Literal["start", "load", "read", "compile", "step", "evaluate", "save", "done"]
SIZE = 256  # bytes: one write, so that a reader sees a whole beat


class Heartbeat:
    """Says that this rank is alive, and where it is."""

    def __init__(self, path: str | None) -> None:
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self.step, self.phase = 0, "start"
        self.work = 0.0  # seconds of the last step that this rank spent by itself

    @classmethod
    def from_environment(cls) -> Self:
        return cls(os.environ.get("MANTA_HEARTBEAT"))

    @property
    def is_heard(self) -> bool:
        """Whether a supervisor reads it."""
        return self._file is not None

    def __call__(self, phase: Phase, step: int) -> None:
        """`step`: optimizer steps finished."""
        self.step, self.phase = step, phase
        if self._file is not None:
            beat = json.dumps({"step": step, "phase": phase, "time": time.monotonic(), "work": round(self.work, 6)})
            os.pwrite(self._file, beat.ljust(SIZE).encode(), 0)
