"""Open files that another user may have replaced: never a pipe, a device or a directory, and never more than a limit of bytes."""

import errno
import os
import stat
from io import FileIO
from pathlib import Path
from typing import BinaryIO

MAX_READ = 1 << 34  # bytes of a file that is read whole, unless its reader knows a lower limit: the index of a very large corpus


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading. Never waits, as opening a named pipe would.

    Raises OSError, also if the path is not a regular file.
    """
    return open(path, "rb", buffering, opener=_open_regular)


def read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a regular file. Raises OSError, also if the path is not a regular file or has more than `limit` bytes."""
    with open_regular(path) as file:
        content = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))
    return content


def open_own(path: Path) -> BinaryIO:
    """Open a regular file of this user's in a directory where others may write.

    Raises PermissionError if it is another user's, a link or not a regular file.
    """
    return open(path, "rb", opener=_open_own)


def open_own_to_write(path: Path) -> FileIO:
    """Open it for reading and writing, unbuffered, and create it if there is none."""
    return open(path, "r+b", buffering=0, opener=lambda name, flags: _open_own(name, flags | os.O_CREAT))


def make_own_directory(path: Path) -> None:
    """Make a directory, unless it is there, that only this user can read. Raises OSError if it is another user's, or a link."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.lstat().st_uid != os.geteuid() or not stat.S_ISDIR(path.lstat().st_mode):
        raise PermissionError(errno.EPERM, "not this user's directory", str(path))


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor


def _open_own(path: str, flags: int) -> int:
    try:
        descriptor = _open_regular(path, flags | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.EINVAL}:
            raise PermissionError(errno.EPERM, "a link or not a regular file", path) from None
        raise
    if os.fstat(descriptor).st_uid != os.geteuid():
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "another user's file", path)
    return descriptor
