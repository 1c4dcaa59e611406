"""Follow a file that another process appends to."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TypeVar

from manta.cluster.protocol import LONGEST_LINE, open_regular, read_lines

T = TypeVar("T")
CHUNK = 16 * LONGEST_LINE  # bytes read at a time


class Tail:
    """Returns what was appended after byte `start`, and since the last call. A truncated or replaced file is read from its start."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path = path
        self._position = start
        self._inode: int | None = None  # of the file that was read last

    def new(self) -> bytes:
        """Return new bytes, up to CHUNK at a time; none if there is no file yet. Raises OSError if it cannot be read."""
        try:
            with open_regular(self.path) as file:
                inode = os.fstat(file.fileno()).st_ino
                if self._position > file.seek(0, 2) or self._inode not in {None, inode}:
                    self._position = 0
                self._inode = inode
                file.seek(self._position)
                content = file.read(CHUNK)
        except FileNotFoundError:
            return b""
        self._position += len(content)
        return content

    def lines(self, parse: Callable[[bytes], T]) -> list[T]:
        """Return what `parse` makes of the new complete lines, all at once."""
        return [line for batch in self.batches(parse) for line in batch]

    def batches(self, parse: Callable[[bytes], T]) -> Iterator[list[T]]:
        """Yield what `parse` makes of the new complete lines. Those for which it raises ValueError are skipped, and the first is logged.

        An incomplete last line is returned later, with its rest. So is everything while the file cannot be read: it may be on a shared disk
        that is away for a moment.
        """
        with suppress(OSError):
            while content := self.new():
                start, is_all = self._position - len(content), len(content) < CHUNK
                complete = content.rfind(b"\n") + 1 or (0 if is_all else CHUNK)  # CHUNK: of a line that is too long
                lines = list(read_lines(BytesIO(content[:complete]), parse, path=self.path, start=start))
                self._position = start + complete
                yield lines
                if is_all:
                    break
