"""The agent of one node: an actor that starts, watches and ends the ranks there. It decides nothing."""

import asyncio
import contextlib
import ipaddress
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import psutil

from manta.cluster.environment import inherited
from manta.cluster.machine import cores
from manta.cluster.nodes.oom_kills import count_oom_kills
from manta.cluster.nodes.process import Process
from manta.cluster.nodes.report import NodeFacts, RankStatus
from manta.cluster.protocol import (
    LONGEST_LINE,
    PENDING_COLLECTIVE,
    Env,
    ExitCode,
    HeartbeatReader,
    RankError,
    deny_writes_by_others,
    open_regular,
    read_error,
    reserve_heartbeat,
)

POLL_INTERVAL = 0.05  # seconds between two readings of the heartbeats; an exit is noticed at once
TAIL = 4096  # last bytes of a log, used as the error message
STACK_DUMP_TIME = 1.0  # seconds that ranks have to write their stack traces


class _Rank(NamedTuple):
    process: Process
    number: int
    log: Path
    error: Path
    heartbeat: HeartbeatReader
    oom_kills: int  # when it started


class NodeAgent:
    """Runs the ranks of one node, and a pool of warm standby processes for the next attempt.

    A Ray actor, written as a plain class. Every method runs on one event loop, in one thread, so nothing needs a lock.
    """

    def __init__(
        self, *, program: Sequence[str], environment: dict[str, str], directory: Path, address: str, host_ranks: int, scratch: Path | None
    ) -> None:
        """program, environment, directory: see Job. host_ranks: ranks of the run on this machine, including those of other agents."""
        self._program, self._directory, self._address = program, directory, address
        deny_writes_by_others()
        self._scratch = Path(tempfile.mkdtemp(prefix="manta-agent-", dir=scratch))
        self._environment = {
            **dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _interface(address)),
            "OMP_NUM_THREADS": str(max(1, cores() // host_ranks)),
            **inherited(os.environ),
            **environment,
            Env.STANDBY: "1",
        }
        self._any_ended = asyncio.Event()
        self._attempt = 0  # the newest that it has run ranks of
        self._started = 0
        self._standby: list[Process] = []
        self._heartbeats: list[Path] = []  # files, used again by each attempt: a disk that fills up meanwhile has room for them
        self._ranks: list[_Rank] = []
        self._reported: object = None

    async def follow_raylet(self) -> None:
        """Exit when the raylet does. Ray itself only checks that its process id exists, and takes a zombie for a living process."""
        raylet = os.pidfd_open(os.getppid())
        asyncio.get_running_loop().add_reader(raylet, os._exit, 1)

    async def describe(self, packages: Sequence[str], directory_token: Path) -> NodeFacts:
        return NodeFacts(
            host=socket.gethostname(),
            address=self._address,
            versions={package: _version(package) for package in packages},
            directory_token=_read_from(directory_token, 0),
        )

    async def free_port(self) -> int:
        """Return a port that is free now. If another process takes it, the attempt fails, and the next one asks again."""
        with socket.socket() as probe:
            probe.bind((self._address, 0))
            return probe.getsockname()[1]

    async def fill_standby(self, count: int, attempt: int) -> None:
        """Fill the pool of standby processes up to `count`; they warm up by themselves. attempt: the newest at the time of the call.

        Ray may reorder calls: if this agent already runs the ranks of a later attempt, they came from the pool, and none is added.
        """
        if attempt >= self._attempt:
            self._fill_standby(count)

    def _fill_standby(self, count: int) -> None:
        self._standby = [process for process in self._standby if process.is_alive]
        self._standby += [self._spawn() for _ in range(count - len(self._standby))]
        while len(self._heartbeats) < count:
            self._heartbeats.append(self._scratch / f"heartbeat-{len(self._heartbeats):04d}")
            reserve_heartbeat(self._heartbeats[-1])

    async def start(self, attempt: int, environments: Sequence[Mapping[str, str]]) -> list[int]:
        """Make standby processes the ranks of an attempt, after starting those that are missing; return their process ids."""
        self._attempt = attempt
        await self.kill()
        self._fill_standby(len(environments))
        self._ranks = [self._assign(self._standby.pop(0), attempt, environment) for environment in environments]
        self._reported = None
        return [rank.process.pid for rank in self._ranks]

    async def poll(self, wait: float) -> list[RankStatus]:
        """Return the ranks' statuses: at once after a rank exited or all made their first step, else after `wait` seconds."""
        deadline = time.monotonic() + wait
        while (progress := self._progress()) == self._reported and (remaining := deadline - time.monotonic()) > 0:
            self._any_ended.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._any_ended.wait(), min(POLL_INTERVAL, remaining))
        self._reported = progress
        return [_status(rank) for rank in self._ranks]

    async def terminate(self) -> None:
        """Ask the ranks to save and exit. Kill the standby processes, which have nothing to save."""
        for rank in self._ranks:
            rank.process.send_signal(signal.SIGTERM)
        await _kill_all(self._standby)

    async def dump_stacks(self) -> list[int]:
        """Have the ranks log their stack traces; return the ranks that report that they wait in a collective."""
        sizes = [_size(rank.log) for rank in self._ranks]
        for rank in self._ranks:
            rank.process.send_signal(signal.SIGUSR2)
        await asyncio.sleep(STACK_DUMP_TIME)
        return [rank.number for rank, size in zip(self._ranks, sizes, strict=True) if PENDING_COLLECTIVE.search(_read_from(rank.log, size))]

    async def kill(self) -> None:
        """Kill the ranks, not the standby processes; return when they are gone."""
        await _kill_all([rank.process for rank in self._ranks])

    async def close(self) -> None:
        await _kill_all([*self._standby, *(rank.process for rank in self._ranks)])
        shutil.rmtree(self._scratch, ignore_errors=True)

    async def sentinel(self) -> None:
        """Never return: a caller that waits for the result learns of this actor's death at once."""
        await asyncio.Event().wait()

    def _spawn(self) -> Process:
        self._started += 1
        log = self._scratch / f"standby-{self._started:04d}.log"
        command = (sys.executable, *self._program)
        return Process(command, environment=self._environment, directory=self._directory, log=log, any_ended=self._any_ended)

    def _assign(self, process: Process, attempt: int, environment: Mapping[str, str]) -> _Rank:
        number = int(environment["RANK"])
        logs = self._directory / "logs" / f"attempt-{attempt:04d}"
        with contextlib.suppress(OSError):  # the disk is full: the rank's output goes to the standby process's log
            logs.mkdir(parents=True, exist_ok=True)
        heartbeat = self._heartbeats[int(environment["LOCAL_RANK"])]
        log = logs / f"rank-{number:04d}.log"
        reserve_heartbeat(heartbeat)
        error = self._scratch / f"error-{attempt:04d}-{number:04d}.json"
        rank = _Rank(process, number, log, error, HeartbeatReader(heartbeat), count_oom_kills())
        files = {Env.HEARTBEAT_FILE: str(heartbeat), Env.ERROR_FILE: str(rank.error), Env.LOG_FILE: str(rank.log)}
        process.assign({**environment, **files})
        return rank

    def _progress(self) -> object:
        """A value whose change makes `poll` return immediately."""
        for rank in self._ranks:
            rank.heartbeat.read()
        return sum(not rank.process.is_alive for rank in self._ranks), all(rank.heartbeat.last.has_stepped for rank in self._ranks)


def _status(rank: _Rank) -> RankStatus:
    heartbeat = rank.heartbeat.read()
    failed = rank.process.code not in {None, ExitCode.DONE, ExitCode.SAVED}
    with contextlib.suppress(OSError):
        if failed and not rank.log.exists():  # it died before it opened its log
            shutil.copyfile(rank.process.log, rank.log)
    return RankStatus(
        rank=rank.number,
        pid=rank.process.pid,
        step=heartbeat.step,
        phase=heartbeat.phase,
        silent_seconds=rank.heartbeat.silent_seconds,
        has_stepped=heartbeat.has_stepped,
        resumed_from=heartbeat.resumed_from,
        state=rank.process.state,
        code=rank.process.code,
        exited_at=rank.process.exited_at or 0.0,
        error=_error(rank) if failed else None,
        tail=_tail(rank.log) or _tail(rank.process.log) if failed else "",
        work=heartbeat.work,
        unwritten=heartbeat.unwritten,
        disk_error=heartbeat.disk_error,
        intervals=rank.heartbeat.intervals,
        longest=rank.heartbeat.longest,
    )


def _error(rank: _Rank) -> RankError | None:
    """Return the error that the rank wrote, or could not write because the kernel killed it when memory ran out."""
    if rank.process.code == -signal.SIGKILL and count_oom_kills() > rank.oom_kills:
        return RankError(type="SIGKILL", message="killed by the kernel: out of memory", category="out_of_memory")
    return read_error(rank.error)


async def _kill_all(processes: Sequence[Process]) -> None:
    await asyncio.gather(*(process.kill() for process in processes))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _tail(path: Path) -> str:
    return _read_from(path, _size(path) - TAIL)


def _read_from(path: Path, offset: int) -> str:
    try:
        with open_regular(path) as file:
            file.seek(max(0, offset))
            return file.read(LONGEST_LINE).decode(errors="replace")
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _interface(address: str) -> str:
    """Return the network interface that has an address. gloo and NCCL are pinned to it: they might pick another."""
    address = "127.0.0.1" if ipaddress.ip_address(address).is_loopback else address  # the loopback answers to all of 127.0.0.0/8
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return name
    raise LookupError(f"no network interface has the address {address}")
