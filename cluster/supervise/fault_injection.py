"""Faults done on purpose, for a drill: by a Ray actor of its own on the node of the rank that is to suffer."""

import asyncio
import os
import resource
import signal
from pathlib import Path
from typing import Literal

import psutil

Fault = Literal["kill", "stop", "slow", "full", "agent", "node"]
HELD, FREE = 0.06, 0.02  # seconds by turns: a slowed rank has a fourth of its time
ROOM = 1 << 16  # bytes by which the files of a rank may grow whose disk is full


class Hand:
    """Written as a plain class: every method runs on one event loop, so that what goes on can be ended."""

    def __init__(self) -> None:
        self._holding: set[int] = set()

    async def ready(self) -> None:
        """Answers once it is there."""

    async def harm(self, fault: Fault, rank: int) -> None:
        """rank: its process id. What does not end it goes on until `heal`."""
        process = psutil.Process(rank)
        match fault:
            case "kill":
                process.kill()
            case "stop":
                process.suspend()
            case "slow":
                await self._hold(process)
            case "full":
                _limit(process, _largest(process) + ROOM)
            case "agent":
                os.kill(process.ppid(), signal.SIGKILL)
            case "node":
                os.kill(psutil.Process(process.ppid()).ppid(), signal.SIGKILL)  # the raylet: whatever is on its node dies with it

    async def heal(self, rank: int) -> None:
        """Ends what goes on. The hand may be gone right after it."""
        self._holding.discard(rank)
        process = psutil.Process(rank)
        process.resume()
        _limit(process, resource.RLIM_INFINITY)

    async def _hold(self, process: psutil.Process) -> None:
        self._holding.add(process.pid)
        while process.pid in self._holding:
            process.suspend()
            await asyncio.sleep(HELD)
            process.resume()
            await asyncio.sleep(FREE)


def _limit(process: psutil.Process, size: int) -> None:
    """No file may be written beyond so many bytes; a write that would meets an error, as on a full disk."""
    _, most = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (most if size == resource.RLIM_INFINITY else size, most))


def _largest(process: psutil.Process) -> int:
    """Bytes of the largest file that it writes to."""
    return max((Path(file.path).stat().st_size for file in process.open_files() if file.mode != "r"), default=0)
