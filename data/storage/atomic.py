"""Files that are complete or absent, also after a power cut."""

import os
from pathlib import Path

TEMPORARY = ".tmp"  # suffix of files that are still being written


def write_atomically(path: Path, content: bytes) -> None:
    """Raises OSError if the disk fails; then the old content remains."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk it takes room
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
