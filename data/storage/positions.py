"""Name places in files as a user finds them: by line, row or document.

An input split gives each of its documents a position, in one unit. A position is cheap to record and to seek; its line
is counted on request.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from manta.data.errors import InputError, redact
from manta.data.storage.location import absolute
from manta.data.storage.store import open_store
from manta.data.storage.streams import compression_of, open_bytes, open_text

Unit = Literal["byte", "character", "row", "document", "token"]

BLOCK = 1 << 20  # bytes or characters read at a time
FILE = 1 << 40  # a position in one of several text files is file * FILE + character
MAX_COUNTED = 1 << 30  # bytes or characters: beyond, a place is named by its byte instead of by counting all lines before it


class Places(BaseModel, frozen=True, extra="forbid"):
    """The files of an input split, and what a position in them counts, from 0.

    | unit | position |
    |---|---|
    | byte | of the decompressed file |
    | character | of the decoded file, plus FILE times the number of the file |
    | row, document, token | its number in the file |
    """

    unit: Unit
    paths: tuple[str, ...]
    """Paths or URLs; or the name of a dataset's shard, which has rows."""
    sizes: tuple[int | None, ...] = ()
    """Bytes of each file when it was recorded, None if it is remote; empty while the files are read."""

    def recorded(self) -> Self:
        """Return the same for later: absolute, with sizes, and in Unicode, whatever bytes the file names hold."""
        paths = tuple(path if path.startswith("hf:") else absolute(path) for path in self.paths)
        sizes = tuple(_status(path)[0] for path in paths) if self.unit in _NEWLINES else ()
        return self.model_copy(update={"paths": tuple(path.encode(errors="backslashreplace").decode() for path in paths), "sizes": sizes})

    def location(self, position: int) -> str:
        return self.locations([position])[0]

    def locations(self, positions: Sequence[int]) -> list[str]:
        """Return "PATH: line 12", "PATH: row 12" or similar for each position. Each file is read at most once, and not to its end.

        A line is counted only up to MAX_COUNTED. Beyond, or if the file is gone or damaged, the byte or the character is named; and of
        recorded places also if the file is remote or has another size now.
        """
        files = [divmod(position, FILE) if self.unit == "character" else (0, position) for position in positions]
        lines: dict[tuple[int, int], int] = {}
        for index in {file for file, _ in files} if self.unit in _NEWLINES else ():
            stops = sorted({at for file, at in files if file == index and at <= MAX_COUNTED})
            lines |= {(index, at): line for at, line in zip(stops, self._lines(index, stops), strict=False)}
        return [redact(f"{self.paths[place[0]]}: {self._name(place[1], lines.get(place))}") for place in files]

    def _name(self, position: int, line: int | None) -> str:
        if line is not None:
            return f"line {line}"
        return f"{self.unit} {position + 1 if self.unit in {'row', 'document'} else position}"

    def _lines(self, index: int, stops: Sequence[int]) -> Sequence[int]:
        """Return the line of each position, which rise, in one of the files; fewer, or none, if it cannot be read as it was recorded."""
        path = self.paths[index]
        size, version = _status(path)
        if self.sizes and (size is None or size != self.sizes[index]):
            return []
        try:
            if self.unit == "character":
                with open_text(path) as text:
                    return _count(text, "\n", stops)
            with open_bytes(path) as stream:
                if size is None or compression_of(path):
                    return _count(stream, b"\n", stops)
                return _count_from_marks(stream, _marks(path, size, version), stops)
        except InputError:
            return []


_NEWLINES = ("byte", "character")  # units of files that have lines


def count_lines(path: str, stop: int) -> int:
    """Return the line ends in the first `stop` bytes of a decompressed file, or in all of it if it is shorter."""
    lines = 0
    with open_bytes(path) as stream:
        while stop > 0 and (block := stream.read(min(stop, BLOCK))):
            stop, lines = stop - len(block), lines + block.count(b"\n")
    return lines


def _status(path: str) -> tuple[int | None, int]:
    """Return a file's size and time of change; no size if it is remote or gone."""
    if not open_store(path).is_local:
        return None, 0
    try:
        status = Path(path).stat()
    except OSError:
        return None, 0
    return status.st_size, status.st_mtime_ns


def _count(stream: Any, newline: str | bytes, stops: Sequence[int]) -> list[int]:
    """Return the line of each position, up to the end of the stream."""
    done, line, lines = 0, 1, list[int]()
    for stop in stops:
        while done < stop and (block := stream.read(min(stop - done, BLOCK))):
            done, line = done + len(block), line + block.count(newline)
        if done < stop:
            break
        lines.append(line)
    return lines


def _count_from_marks(stream: Any, marks: NDArray[np.int64], stops: Sequence[int]) -> list[int]:
    """Return the same, reading less than a block for each position."""
    lines: list[int] = []
    for stop in stops:
        mark, rest = divmod(stop, BLOCK)
        if mark >= len(marks):
            break
        stream.seek(mark * BLOCK)
        lines.append(int(marks[mark]) + stream.read(rest).count(b"\n"))
    return lines


@lru_cache(maxsize=256)
def _marks(path: str, size: int, _version: int) -> NDArray[np.int64]:
    """Return the line at every BLOCK bytes of a file. The samples of a step are often from the same few files."""
    counts = [1]
    with open_bytes(path) as stream:
        for _ in range(min(size, MAX_COUNTED) // BLOCK):
            counts.append(counts[-1] + stream.read(BLOCK).count(b"\n"))
    return np.array(counts, dtype=np.int64)
