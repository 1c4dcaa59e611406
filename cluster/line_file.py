"""A file of lines that must not be lost: the event log, and the metrics. A leaf, like `protocol`: ranks import it as well."""

import errno
import os
import stat
from collections import deque
from contextlib import suppress
from pathlib import Path

MOST_UNWRITTEN = 64 << 20  # bytes of lines that wait in memory for room on the disk; then the oldest are lost
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})  # EFBIG: a limit of the size of files
BLOCK = 1 << 16  # bytes


class LineFile:
    """Appends lines to a file; one process at a time. A line is written whole, or waits in memory until there is room for it."""

    def __init__(self, path: Path, *, sync: bool = False) -> None:
        """Remove an incomplete last line, of a writer that was killed. sync: whether a line outlasts a power cut.

        Raises OSError if the file cannot be opened for another reason than a full or read-only disk.
        """
        self.path, self._sync = path, sync
        self._waiting = deque[bytes]()
        self._file: int | None = None
        self.unwritten = 0
        """Bytes that wait."""
        self.lost = 0
        """Lines that were dropped, because too many wait."""
        self.error: OSError | None = None
        """Why lines wait, or the file could not be opened yet."""
        self.flush()
        if self.error is not None and self.error.errno not in NO_ROOM:
            raise self.error

    def write(self, line: bytes) -> None:
        """Write a line, without its end. Those that wait are written first."""
        self._wait(line + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write the lines that wait, as far as there is room."""
        written: list[bytes] = []
        try:
            if self._file is not None and self._waiting and not _is_at(self.path, self._file):
                self._close()  # the file was deleted, or its directory moved
            if self._file is None:
                self._file = _open(self.path)
            while self._waiting:
                _write(self._file, self._waiting[0])
                written.append(self._take())
            if written and self._sync:
                os.fsync(self._file)
            self.error = None
        except OSError as error:
            self.error = error
            if self._file is not None:
                if written and not self._waiting:  # fsync failed: they may not have reached the disk
                    with suppress(OSError):
                        os.ftruncate(self._file, os.fstat(self._file).st_size - sum(map(len, written)))
                        for line in written:
                            self._wait(line)
                with suppress(OSError):
                    _cut(self._file, self.path)
                self._close()  # the next flush opens it again, so that another disk may also be mounted there

    def problem(self) -> str | None:
        """Describe what could not be written yet, and how much room it needs; None if everything is written."""
        if self.error is None:
            return None
        lost = f"; {self.lost:,} lines are lost" if self.lost else ""
        return f"{self.path}: {self.error.strerror}: needs {self.unwritten:,} bytes{lost}. Free some space."

    def close(self) -> None:
        """Write the lines that wait, if there is room; `problem` describes the others."""
        self.flush()
        with suppress(OSError):
            self._file = self._file if self._file is not None else _open(self.path)
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _wait(self, line: bytes) -> None:
        self._waiting.append(line)
        self.unwritten += len(line)
        while self.unwritten > MOST_UNWRITTEN:
            self._take()
            self.lost += 1

    def _take(self) -> bytes:
        line = self._waiting.popleft()
        self.unwritten -= len(line)
        return line


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except OSError:
        return False


def _open(path: Path) -> int:
    """Open a regular file, and cut it after its last whole line."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
    try:
        _cut(file, path)
    except OSError:
        os.close(file)
        raise
    return file


def _cut(file: int, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    size = end = os.fstat(file).st_size
    last_newline = 0
    while end and not last_newline:
        start = max(0, end - BLOCK)
        last_newline = os.pread(file, end - start, start).rfind(b"\n") + 1
        end = start + last_newline
    if end < size:
        os.ftruncate(file, end)


def _write(file: int, line: bytes) -> None:
    while line:
        line = line[os.write(file, line) :]
