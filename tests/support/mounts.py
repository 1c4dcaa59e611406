"""Small file systems that a test mounts, because root ignores permissions, and a limit of files says another error than a full disk."""

import os
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


def mounted_with_quota(path: Path) -> Iterator[Path]:
    """Yield a file system whose quota of 2 MB can be exceeded although its disk has room. tmpfs has none on many kernels."""
    image = path.with_suffix(".image")
    image.touch()
    os.truncate(image, 120 << 20)
    path.mkdir()
    setup = ("mkfs.btrfs -q {image}", "mount -o loop {image} {path}", "btrfs quota enable {path}", "btrfs qgroup limit 2M {path}")
    try:
        for command in setup:
            arguments = [part.format(image=image, path=path) for part in command.split()]
            if shutil.which(arguments[0]) is None or subprocess.run(arguments, capture_output=True, check=False).returncode:
                pytest.skip(f"no file system with a quota: {command}")
        yield path
    finally:
        if path.is_mount():
            subprocess.run(["umount", "--lazy", path], check=True)


def lift_quota(path: Path) -> None:
    subprocess.run(["btrfs", "qgroup", "limit", "none", path], check=True)


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
