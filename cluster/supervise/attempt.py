"""One attempt: from the word "go" to its outcome. It says what it sees as events, and leaves what follows to its caller."""

import bisect
import itertools
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from manta.cluster.config import ClusterConfig
from manta.cluster.job import Job
from manta.cluster.nodes.agent import NodeFacts
from manta.cluster.nodes.capacity import Room
from manta.cluster.nodes.placement import Place
from manta.cluster.protocol import Env, ExitCode
from manta.cluster.supervise.event_log import POLL, Event
from manta.cluster.supervise.failure import STOPPED, Cause, Failure, Limits, RankStatus, blames_a_peer, explain, guilty, stalled
from manta.cluster.supervise.requests import Orders
from manta.cluster.supervise.stragglers import Pace, limits, slow

if TYPE_CHECKING:
    from manta.cluster.nodes.node_group import Nodes  # it imports Ray, which must wait until its environment stands

TICK = 0.25  # seconds between two reports of progress, of up to 250 nodes; of more it is a millisecond a node
SETTLE = 0.1  # seconds to wait for a killed rank after one that raised: the killed one is the cause
FALLEN = 5.0  # seconds that ranks have to leave once one of them has fallen: what they wait for may never come
SETTLES = 10  # as often, where one raised that a peer is gone: there is one that has not been seen to fall yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """All ranks ended well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """The ranks were told to leave; `saved` when every one of them did."""

    saved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Regrouped:
    """The ranks left, to go on elsewhere: on more nodes, without those that go, or under another head of Ray's. What they had not saved
    is done again.
    """


Outcome = Done | Left | Regrouped | Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    number: int
    nodes: "Nodes"
    job: Job
    config: ClusterConfig
    orders: Orders
    room: Room

    def run(self) -> Generator[Event, None, Outcome]:
        """NodeLostError goes up to the caller; after any other outcome no rank is left."""
        if (wrong := (yield from self._welcome())) is not None:
            return wrong
        environments = places(self.job, self.number, self.nodes.places, self.nodes.facts, self.nodes.free_port())
        pids = self.nodes.start(self.number, environments)
        on = [node for node, place in enumerate(self.nodes.places) for _ in range(place.ranks)]
        ranks = [{"rank": rank, "pid": pid, "node": node} for rank, (pid, node) in enumerate(zip(pids, on, strict=True))]
        yield self._event("attempt-started", ranks=ranks)
        stepped, pace = False, Pace()
        while True:
            statuses = self.nodes.poll(self._tick_length)
            exited = [status for status in statuses if status.code is not None]
            if any(status.code not in STOPPED | {0} for status in exited):
                return (yield from self._crash())
            if self.orders.leave or any(status.code in STOPPED for status in exited):
                return (yield from self._leave())
            if statuses and len(exited) == len(statuses):
                return Done()
            if not stepped and statuses and all(status.has_stepped for status in statuses):
                stepped = True
                if self.config.hot_standby:
                    self.nodes.stand_by()
                yield self._event("first-step", step=min(status.step for status in statuses))
            if (why := self._elsewhere(stepped=stepped)) is not None:
                yield why
                return (yield from self._regroup())
            patience = limits(statuses, start=self.config.start_timeout, step=self.config.step_timeout)
            if stalled(statuses, patience):
                return (yield from self._hang(statuses, patience))
            pace = yield from self._compare(statuses, pace)
            yield self._tick(statuses)

    def _welcome(self) -> Generator[Event, None, Failure | None]:
        """Who is there; and what is wrong with them, where something is."""
        for index, facts in self.nodes.welcome():
            place = {"node": index, "host": facts.host, "address": facts.address}
            yield self._event("node-ready", **place, differs=differences(self.job, facts))
            if (message := unfit(self.job, facts)) is not None:
                yield self._event("node-unfit", **place, message=message)
                return Failure(cause=Cause.INPUT, rank=None, step=0, message=message)
        return None

    def _compare(self, statuses: Sequence[RankStatus], before: Pace) -> Generator[Event, None, Pace]:
        pace, slower = slow(statuses, before)
        for one in slower:
            yield self._event("rank-slow", node=self.nodes.facts[self.node_of(one.rank)].host, **asdict(one))
        return pace

    def _crash(self) -> Generator[Event, None, Failure]:
        """What survivors could still do does not count: what counts is on disk. So they are ended at once."""
        noticed = time.time()
        status = guilty(self._failed(self.nodes.poll(0)))
        for again in range(SETTLES):
            if (status.code or 0) < 0 or (again and not blames_a_peer(status)):
                break
            time.sleep(SETTLE)
            status = guilty(self._failed(self.nodes.poll(0)))
        self.nodes.kill()
        yield self._fell(status, noticed)
        return explain(status)

    def _hang(self, statuses: Sequence[RankStatus], patience: Limits) -> Generator[Event, None, Failure]:
        failure = stalled(statuses, patience, waiting=self.nodes.dump_stacks())
        assert failure is not None
        self.nodes.kill()
        told = {"rank": failure.rank, "code": None, "cause": failure.cause.name, "message": failure.message, "step": failure.step}
        yield self._event("rank-failed", **told, **self._where(failure.rank))
        return failure

    def _leave(self) -> Generator[Event, None, Done | Left]:
        self.nodes.terminate()
        yield self._event("leaving", signal=self.orders.leave.name if self.orders.leave else None, grace=self.config.grace_period)
        deadline = time.monotonic() + self.config.grace_period
        statuses = self.nodes.poll(0)
        while any(s.code is None for s in statuses) and time.monotonic() < deadline and not self.orders.at_once:
            statuses = self.nodes.poll(self._tick_length)
            if self._failed(statuses):
                deadline = min(deadline, time.monotonic() + FALLEN)
            yield self._tick(statuses)
        self.nodes.kill()
        if failed := [s for s in statuses if s in self._failed(statuses) or s.error]:  # what kept it from saving
            yield self._fell(guilty(failed), time.time())
        codes = {status.code for status in statuses}
        return Done() if codes == {ExitCode.DONE} else Left(saved=codes <= {ExitCode.DONE, ExitCode.SAVED})

    def _elsewhere(self, *, stepped: bool) -> Event | None:
        """Why the ranks should leave and go on elsewhere, if they should."""
        if self.room.is_headless:
            return self._event("head-lost")
        if not stepped:
            return None
        if (going := self.room.to_go(self.nodes.places)) or self.room.must_leave:
            return self._event("nodes-draining", nodes=[str(machine) for machine in going], here=self.room.must_leave)
        if more := self.room.for_more(self.nodes.places):
            return self._event("nodes-appeared", ranks=more.ranks, nodes=[str(place.machine) for place in more.places])
        return None

    def _regroup(self) -> Generator[Event, None, Done | Left | Regrouped]:
        outcome = yield from self._leave()
        stays = isinstance(outcome, Left) and not self.orders.leave and not self.room.must_leave
        return Regrouped() if stays else outcome

    @staticmethod
    def _failed(statuses: Sequence[RankStatus]) -> list[RankStatus]:
        return [status for status in statuses if status.code not in STOPPED | {None, 0}]

    def _fell(self, status: RankStatus, noticed: float) -> Event:
        failure = explain(status)
        return self._event(
            "rank-failed",
            rank=status.rank,
            code=status.code,
            cause=failure.cause.name,
            message=failure.message,
            step=status.step,
            phase=status.phase,
            **self._where(status.rank),
            traceback=status.error.traceback if status.error else status.tail,
            noticed_after=round(noticed - status.exited_at, 3),
        )

    def node_of(self, rank: int) -> int:
        """Which node it is on."""
        ends = list(itertools.accumulate(place.ranks for place in self.nodes.places))
        return bisect.bisect_right(ends, rank)

    def _where(self, rank: int | None) -> dict[str, str]:
        """Which machine a rank is on, for people and by its id."""
        if rank is None:
            return {}
        machine = self.nodes.places[self.node_of(rank)].machine
        return {"host": machine.host, "address": machine.address, "machine": machine.id}

    @property
    def _tick_length(self) -> float:
        return max(TICK, 0.001 * len(self.nodes.places))

    def _tick(self, statuses: Sequence[RankStatus]) -> Event:
        return self._event(POLL, ranks=[{"rank": s.rank, "step": s.step, "phase": s.phase, "quiet": round(s.quiet, 2)} for s in statuses])

    def _event(self, kind: str, **details: Any) -> Event:
        return Event(kind=kind, attempt=self.number, time=time.time(), details=details)


def differences(job: Job, facts: NodeFacts) -> list[str]:
    """What a node has in another version than the controller's machine."""
    return [
        f"{package} {facts.versions.get(package) or 'is not there'} for {wanted}"
        for package, wanted in job.packages
        if facts.versions.get(package) != wanted
    ]


def unfit(job: Job, facts: NodeFacts) -> str | None:
    """Why a node can have no ranks; None where it can."""
    node = f"{facts.host} ({facts.address})"
    if facts.seal != job.seal.read_text():
        return f"{job.directory}: {node} does not see it, wants a directory that all nodes share; put run.dir on one"
    for package, wanted in job.packages[:1]:
        if (got := facts.versions.get(package)) != wanted:
            return f"{node}: got {package} {got}, wants {wanted}, as here; install it there"
    return None


def places(job: Job, attempt: int, nodes: Sequence[Place], facts: Sequence[NodeFacts], port: int) -> list[list[dict[str, str]]]:
    """The environment of every rank, node by node: ranks are numbered along the nodes."""
    count = sum(node.ranks for node in nodes)
    numbers = iter(range(count))
    return [
        [
            {
                "RANK": str(next(numbers)),
                "WORLD_SIZE": str(count),
                "LOCAL_RANK": str(local),
                "LOCAL_WORLD_SIZE": str(node.ranks),
                "MASTER_ADDR": facts[0].address,
                "MASTER_PORT": str(port),
                Env.ATTEMPT: str(attempt),
                **job.environment_by_ranks.get(count, {}),
                **{name: job.environment.get(name, about.interface) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")},
            }
            for local in range(node.ranks)
        ]
        for node, about in zip(nodes, facts, strict=True)
    ]
