"""Small file systems that a test mounts, because root ignores permissions, and a limit of files says another error than a full disk."""

import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest


def mount(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)


def mounted(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    done = mount("-t", "tmpfs", "-o", options, "tmpfs", str(path))
    if done.returncode:
        pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(file: Path, *, leave: int) -> None:
    """Fill the disk, except for `leave` bytes."""
    file.write_bytes(bytes(shutil.disk_usage(file.parent).free - leave))
    assert shutil.disk_usage(file.parent).free == leave


def fill_up(file: Path) -> None:
    """Fill a disk on which others may write meanwhile."""
    with file.open("wb", buffering=0) as filler:
        for size in (1 << 16, 1 << 12):
            with suppress(OSError):
                while filler.write(bytes(size)):
                    pass


def read_only_tmp(workspace: Path) -> str:
    """Return the shell command that makes /tmp read-only in a private mount namespace, except for the workspace, if that is in it."""
    here = shlex.quote(str(workspace))
    return f"mount --bind /tmp /tmp && mount --bind {here} {here} && mount -o remount,ro,bind /tmp && cd {here}"
