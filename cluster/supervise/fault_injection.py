"""Fault injection for a drill: an actor on the node of the rank that is to suffer the fault."""

import asyncio
import os
import resource
import signal
import subprocess
from pathlib import Path
from typing import Literal

import psutil

Fault = Literal["kill", "stop", "slow", "full", "agent", "node"]
# A slowed rank gets a quarter of its time. Suspensions are frequent, so that each forward pass meets one, even in a small model; and longer
# than the differences that straggler detection ignores.
SUSPENDED, RESUMED = 0.015, 0.005  # seconds, alternating
REMAINING_SPACE = 1 << 16  # bytes on a full disk; and by which a rank's files may still grow where nothing can be mounted
# Ends with standard input, and so with the injector, however that ends.
FULL_DISK = f'mount -t tmpfs -o size={REMAINING_SPACE} tmpfs "$0" && echo full && read _; umount -l "$0"'


class FaultInjector:
    """Written as a plain class: every method runs on one event loop, so that `clear` can end a lasting fault."""

    def __init__(self) -> None:
        self._slowed: set[int] = set()
        self._disk: subprocess.Popen[bytes] | None = None

    async def ready(self) -> None:
        """Answers once the actor has started."""

    async def inject(self, fault: Fault, pid: int, checkpoints: str = "") -> None:
        """Inject a fault into a rank, by its process id. A fault that does not end the rank lasts until `clear`."""
        rank = psutil.Process(pid)
        match fault:
            case "kill":
                rank.kill()
            case "stop":
                rank.suspend()
            case "slow":
                await self._slow_down(rank)
            case "full":
                if not self._mount_full_disk(checkpoints):
                    _limit_file_size(rank, _largest_open_file(rank) + REMAINING_SPACE)
            case "agent":
                os.kill(rank.ppid(), signal.SIGKILL)
            case "node":
                os.kill(psutil.Process(rank.ppid()).ppid(), signal.SIGKILL)  # the raylet: every process of its node ends with it

    async def clear(self, pid: int) -> None:
        """End a lasting fault. The actor may be killed right after it."""
        self._slowed.discard(pid)
        rank = psutil.Process(pid)
        rank.resume()
        _limit_file_size(rank, resource.RLIM_INFINITY)
        if self._disk is not None:
            self._disk.communicate()

    def _mount_full_disk(self, directory: str) -> bool:
        """Hide the directory behind a small disk. False if this user may not mount one."""
        command = ["setsid", "--fork", "--wait", "sh", "-c", FULL_DISK, directory]  # not a child: Ray would kill it with the actor
        self._disk = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self._disk.stdout is not None
        return self._disk.stdout.readline() == b"full\n"

    async def _slow_down(self, rank: psutil.Process) -> None:
        self._slowed.add(rank.pid)
        while rank.pid in self._slowed:
            rank.suspend()
            await asyncio.sleep(SUSPENDED)
            rank.resume()
            await asyncio.sleep(RESUMED)


def _limit_file_size(process: psutil.Process, size: int) -> None:
    """Make a write beyond `size` bytes of a file fail, as on a full disk."""
    _, hard_limit = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (hard_limit if size == resource.RLIM_INFINITY else size, hard_limit))


def _largest_open_file(process: psutil.Process) -> int:
    """Return the size in bytes of the largest file that it writes to."""
    return max((Path(file.path).stat().st_size for file in process.open_files() if file.mode != "r"), default=0)
