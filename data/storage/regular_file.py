"""Open files that somebody else may have replaced: never a pipe, a device or a directory, and never more than a limit of bytes."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading. Never waits, as opening a named pipe would.

    Raises OSError, also if the path is not a regular file.
    """
    return open(path, "rb", buffering, opener=_open_regular)


def read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a regular file. Raises OSError, also if the path is not a regular file or has more than `limit` bytes."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))
    return content


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor
