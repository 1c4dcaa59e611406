"""`ranks.json` in the run directory, while the run is running: where each rank is, what it does, and since when it is silent.

It is for people who watch the run. Nothing of the run depends on it: what cannot be written is skipped.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manta.cluster.protocol import open_regular

INTERVAL, RANKS_PER_SECOND = 1.0, 1000  # seconds between two writes, longer for more ranks
LARGEST = 64 << 20  # bytes that are read
KEYS = ("rank", "node", "phase", "step", "silent_seconds")


class ListedRank(BaseModel):
    """`silent_seconds`: since its last heartbeat. `node`: the node's host name."""

    model_config = ConfigDict(frozen=True, strict=True)

    rank: Annotated[int, Field(ge=0)]
    node: Annotated[str, Field(max_length=300)]
    phase: Annotated[str, Field(max_length=20)]
    step: Annotated[int, Field(ge=0, le=10**15)]
    silent_seconds: Annotated[float, Field(ge=0, le=1e12)]


class _File(BaseModel):
    model_config = ConfigDict(strict=True)

    time: Annotated[float, Field(ge=0, le=1e12)]
    ranks: list[ListedRank]


class RankList:
    """Writes the file from time to time, and deletes it at the end."""

    def __init__(self, directory: Path) -> None:
        self._file, self._new = directory / "ranks.json", directory / "ranks.json.new"
        self._due = 0.0

    def write(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Write it if it is due. ranks: each has at least KEYS."""
        if (now := time.monotonic()) < self._due:
            return
        self._due = now + max(INTERVAL, len(ranks) / RANKS_PER_SECOND)
        content = {"time": time.time(), "ranks": [{key: rank[key] for key in KEYS} for rank in ranks]}
        with suppress(OSError):  # its disk is full, or away for a moment
            self._new.write_text(json.dumps(content), encoding="utf-8")
            self._new.replace(self._file)

    def close(self) -> None:
        for file in (self._new, self._file):
            with suppress(OSError):
                file.unlink()


def read_ranks(directory: Path) -> list[ListedRank]:
    """Return the ranks of a running run; none if they cannot be read, or no rank has started.

    The time since the file was written counts as silent.
    """
    try:
        with open_regular(directory / "ranks.json") as file:
            found = _File.model_validate_json(file.read(LARGEST))
    except (OSError, ValidationError):
        return []
    age = max(0.0, time.time() - found.time)
    return [rank.model_copy(update={"silent_seconds": round(rank.silent_seconds + age, 3)}) for rank in found.ranks]
