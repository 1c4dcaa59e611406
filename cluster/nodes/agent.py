"""What runs on one node? An actor that starts, watches and ends the ranks there. It decides nothing."""

import asyncio
import contextlib
import ipaddress
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from manta.cluster.nodes.machine import cores
from manta.cluster.nodes.oom_kills import kills
from manta.cluster.nodes.process import Process
from manta.cluster.protocol import Env, ExitCode, HeartbeatReader, RankError, read_error
from manta.cluster.supervise.failure import RankStatus

LOOK = 0.05  # seconds between two readings of the heartbeats; an exit is seen at once
TAIL = 4096  # bytes of a log that stand for an error
STACKS = 1.0  # seconds that ranks have to write down where they stand
WAITS = re.compile(r"^collectives of group .* is waited for$", re.MULTILINE)  # as `trainer/stack_traces.py` says it
NOT_FOR_RANKS = ("RAY_", "PYTHONPATH", "PYTHONBREAKPOINT", "OMP_NUM_THREADS", "SPT_NOENV")  # what Ray sets for its workers


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """`versions`: of the packages asked for, None where it has none. `seal`: what stands in the run's, None where there is no such file."""

    host: str
    address: str
    interface: str
    versions: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    seal: str | None = None


@dataclass(frozen=True, slots=True)
class _Rank:
    """A process that has its place."""

    process: Process
    number: int
    log: Path
    error: Path
    heartbeat: HeartbeatReader
    kills: int  # of the kernel's for want of memory, when it began


class NodeAgent:
    """A Ray actor, but written as a plain class: every method runs on one event loop, in one thread, so there is nothing to lock."""

    def __init__(
        self, *, address: str, program: Sequence[str], environment: Mapping[str, str], directory: Path, sharing: int, scratch: Path | None
    ) -> None:
        """sharing: ranks of the run on this machine, whichever agents start them."""
        self._address = address
        self._command = (sys.executable, *program)
        self._directory = directory
        if scratch is not None:
            scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._scratch = Path(tempfile.mkdtemp(prefix="manta-agent-", dir=scratch))
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(NOT_FOR_RANKS)},
            "OMP_NUM_THREADS": str(max(1, cores() // sharing)),
            **environment,
            Env.STANDBY: "1",
        }
        self._ended = asyncio.Event()  # some process has
        self._attempt = 0  # the newest whose ranks it was given
        self._started = 0
        self._spares: list[Process] = []
        self._ranks: list[_Rank] = []
        self._reported: object = None

    async def follow_raylet(self) -> None:
        """Leave when the raylet does. Ray looks whether its process id is still there, and takes a zombie for a living one."""
        raylet = os.pidfd_open(os.getppid())
        asyncio.get_running_loop().add_reader(raylet, os._exit, 1)

    async def describe(self, packages: Sequence[str], seal: Path) -> NodeFacts:
        return NodeFacts(
            host=socket.gethostname(),
            address=self._address,
            interface=_interface(self._address),
            versions={package: _version(package) for package in packages},
            seal=_word(seal),
        )

    async def free_port(self) -> int:
        """A port that is free now. Another may take it: then the attempt fails, and the next asks again."""
        with socket.socket() as probe:
            probe.bind((self._address, 0))
            return probe.getsockname()[1]

    async def warm(self, count: int, attempt: int) -> None:
        """Have so many spares; they warm up on their own. attempt: the newest when this was said. Ray lets a call overtake another: where
        this agent has the ranks of a later one by now, the spares have become these.
        """
        if attempt >= self._attempt:
            self._fill(count)

    def _fill(self, count: int) -> None:
        self._spares = [spare for spare in self._spares if spare.alive]
        self._spares += [self._spawn() for _ in range(count - len(self._spares))]

    async def start(self, attempt: int, places: Sequence[Mapping[str, str]]) -> list[int]:
        """Make the spares the ranks of an attempt, starting what is missing. Their process ids."""
        self._attempt = attempt
        await self.kill()
        self._fill(len(places))
        self._ranks = [self._place(self._spares.pop(0), attempt, place) for place in places]
        self._reported = None
        return [rank.process.pid for rank in self._ranks]

    async def poll(self, wait: float) -> list[RankStatus]:
        """How the ranks are: at once when one has exited or all have made their first step, else after `wait` seconds."""
        deadline = time.monotonic() + wait
        while (news := self._news()) == self._reported and (left := deadline - time.monotonic()) > 0:
            self._ended.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), min(LOOK, left))
        self._reported = news
        return [_status(rank) for rank in self._ranks]

    async def terminate(self) -> None:
        """Ask the ranks to save and leave. Spares have nothing to save."""
        for rank in self._ranks:
            rank.process.send(signal.SIGTERM)
        await self._end(self._spares)

    async def dump_stacks(self) -> list[int]:
        """Have the ranks write down where they stand. Those that say that they wait in a collective."""
        before = [_size(rank.log) for rank in self._ranks]
        for rank in self._ranks:
            rank.process.send(signal.SIGUSR2)
        await asyncio.sleep(STACKS)
        return [rank.number for rank, size in zip(self._ranks, before, strict=True) if WAITS.search(_since(rank.log, size))]

    async def kill(self) -> None:
        """End the ranks; return when they are gone. Spares live on."""
        await self._end([rank.process for rank in self._ranks])

    async def close(self) -> None:
        await self._end([*self._spares, *(rank.process for rank in self._ranks)])
        shutil.rmtree(self._scratch, ignore_errors=True)

    async def sentinel(self) -> None:
        """Never returns: whoever waits for it learns of this actor's death at once."""
        await asyncio.Event().wait()

    async def _end(self, processes: Sequence[Process]) -> None:
        await asyncio.gather(*(process.kill() for process in processes))

    def _spawn(self) -> Process:
        self._started += 1
        standby = self._scratch / f"standby-{self._started:04d}.log"
        return Process(self._command, environment=self._environment, directory=self._directory, log=standby, ended=self._ended)

    def _place(self, process: Process, attempt: int, place: Mapping[str, str]) -> _Rank:
        number = int(place["RANK"])
        logs = self._directory / "logs" / f"attempt-{attempt:04d}"
        logs.mkdir(parents=True, exist_ok=True)
        heartbeat = self._scratch / f"heartbeat-{attempt:04d}-{number:04d}"
        log = logs / f"rank-{number:04d}.log"
        rank = _Rank(process, number, log, log.with_suffix(".error.json"), HeartbeatReader(heartbeat), kills())
        files = {Env.HEARTBEAT_FILE: str(heartbeat), Env.ERROR_FILE: str(rank.error), Env.LOG_FILE: str(rank.log)}
        rank.error.unlink(missing_ok=True)  # a controller killed before it could note this attempt's number leaves the number to us
        process.go({**place, **files})
        return rank

    def _news(self) -> object:
        for rank in self._ranks:
            rank.heartbeat.read()
        return sum(not rank.process.alive for rank in self._ranks), all(rank.heartbeat.has_stepped for rank in self._ranks)


def _status(rank: _Rank) -> RankStatus:
    beat = rank.heartbeat.read()
    failed = rank.process.code not in {None, ExitCode.DONE, ExitCode.SAVED}
    if failed and not rank.log.exists():  # it fell before it could take its log
        shutil.copyfile(rank.process.log, rank.log)
    return RankStatus(
        rank=rank.number,
        pid=rank.process.pid,
        step=beat.step,
        phase=beat.phase,
        quiet=rank.heartbeat.quiet,
        has_stepped=rank.heartbeat.has_stepped,
        state=rank.process.state,
        code=rank.process.code,
        exited_at=rank.process.exited_at or 0.0,
        error=_error(rank) if failed else None,
        tail=_tail(rank.log) if failed else "",
        work=beat.work,
        intervals=rank.heartbeat.intervals,
        longest=rank.heartbeat.longest,
    )


def _error(rank: _Rank) -> RankError | None:
    """What it wrote down; or what it could not, for the kernel killed it when memory ran out."""
    if rank.process.code == -signal.SIGKILL and kills() > rank.kills:
        return RankError(type="SIGKILL", message="the kernel killed it, for memory ran out", category="out_of_memory")
    return read_error(rank.error)  # if it wrote none, the end of its log must do


def _tail(path: Path) -> str:
    return _since(path, _size(path) - TAIL)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _since(path: Path, byte: int) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, byte))
        return file.read().decode(errors="replace")


def _word(file: Path) -> str | None:
    return file.read_text() if file.exists() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _interface(address: str) -> str:
    """The network interface that carries an address: gloo and NCCL are told to use it, or they may pick another."""
    wanted = "127.0.0.1" if ipaddress.ip_address(address).is_loopback else address  # the loopback answers to all of 127.0.0.0/8
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == wanted for a in addresses):
            return name
    raise LookupError(f"no network interface has the address {address}")
