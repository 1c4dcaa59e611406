"""Files that are there whole or not at all, also after a power cut."""

import os
from pathlib import Path

TEMPORARY = ".tmp"  # what is still being written ends in this


def write_atomically(path: Path, content: bytes) -> None:
    """Raises OSError where the disk says so; then what was there stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """A rename lives in its directory, and so do those of files before it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
