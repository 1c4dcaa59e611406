"""One attempt: from starting the ranks to an outcome. It yields what it observes as events; the controller decides what follows."""

import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from manta.cluster.config import ClusterConfig
from manta.cluster.job import Job
from manta.cluster.machine import Machine, gpus
from manta.cluster.nodes.placement import NodeAllocation
from manta.cluster.nodes.report import NodeFacts, RankStatus
from manta.cluster.protocol import Env, ExitCode
from manta.cluster.supervise.event_log import POLL, Event
from manta.cluster.supervise.failure import STOPPED, Cause, Failure, failure_of, first_failure, is_peer_failure
from manta.cluster.supervise.hangs import HangLimits, detect_hang, hang_limits
from manta.cluster.supervise.requests import StopRequests
from manta.cluster.supervise.stragglers import LASTING, WorkHistory, find_stragglers

if TYPE_CHECKING:  # they import Ray, which must not be imported before its environment is set
    from manta.cluster.nodes.capacity import Capacity
    from manta.cluster.nodes.node_group import NodeGroup

POLL_INTERVAL = 0.25  # seconds between two progress events, for up to 250 nodes; beyond, a millisecond per node
SETTLE_TIME = 0.1  # seconds to wait, after a rank raised, for one that was killed: that one is the cause
SETTLE_CHECKS = 10  # so often if the rank raised because a peer is gone: another rank's exit has not been noticed yet
AGENT_START_TIMEOUT = 30.0  # seconds
FAILED_GRACE = 5.0  # seconds that ranks have to stop once one of them has failed: they may wait for it forever


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """All ranks finished the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """The ranks stopped on request; `saved` if all of them saved."""

    saved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reallocated:
    """The ranks stopped to resume on different nodes: on more, without draining ones, or under a new head."""


Outcome = Completed | Stopped | Reallocated | Failure
OUTCOME_NAMES = {Completed: "done", Stopped: "left", Reallocated: "reallocated", Failure: "failure"}  # in the event log


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Starts the ranks, watches them, and ends them."""

    number: int
    nodes: "NodeGroup"
    job: Job
    config: ClusterConfig
    requests: StopRequests
    capacity: "Capacity"

    def run(self) -> Generator[Event, None, Outcome]:
        """Run the ranks until there is an outcome; none of them runs afterwards. Passes on NodeLostError."""
        if (failure := (yield from self._check_new_nodes())) is not None:
            return failure
        yield self._start()
        all_loaded, all_stepped, history = False, False, WorkHistory()
        lasting = LASTING if is_one_machine_without_gpus(self.nodes.allocations) else 0.0
        while True:
            statuses = self.nodes.poll(self._poll_interval)
            if not all_loaded and statuses and all(status.resumed_from is not None for status in statuses):
                all_loaded = True
                yield self._event("loaded", step=min(status.resumed_from or 0 for status in statuses))
            if (outcome := (yield from self._end(statuses))) is not None:
                return outcome
            if not all_stepped and statuses and all(status.has_stepped for status in statuses):
                all_stepped = True
                if self.config.hot_standby:
                    self.nodes.start_standby()
                yield self._event("first-step", step=1 + min(status.resumed_from or 0 for status in statuses))
            if (reason := self._reason_to_reallocate(all_stepped=all_stepped)) is not None:
                yield reason
                return (yield from self._reallocate())
            limits = hang_limits(statuses, start=self.config.start_timeout, step=self.config.step_timeout)
            if detect_hang(statuses, limits):
                return (yield from self._hang(statuses, limits))
            history, stragglers = find_stragglers(statuses, history, now=time.monotonic(), lasting=lasting)
            for straggler in stragglers:
                yield self._event("rank-slow", node=self.nodes.facts[self._node_by_rank[straggler.rank]]["host"], **asdict(straggler))
            yield self._progress(statuses)

    def _check_new_nodes(self) -> Generator[Event, None, Failure | None]:
        from manta.cluster.nodes.node_group import NodeLostError

        deadline = time.monotonic() + AGENT_START_TIMEOUT
        while not self.nodes.have_started(self._poll_interval) and time.monotonic() < deadline:
            if self.capacity.is_head_lost:
                raise NodeLostError(0, "Ray's head has ended")
            yield self._event(POLL, ranks=[], waiting_for="the nodes' agents")
        for index, facts in self.nodes.describe_new():
            node = {"node": index, "host": facts["host"], "address": facts["address"]}
            yield self._event("node-ready", **node, differs=version_differences(self.job, facts))
            if (message := unfit_reason(self.job, facts)) is not None:
                yield self._event("node-unfit", **node, message=message)
                return Failure(cause=Cause.INPUT, rank=None, step=0, message=message)
        return None

    def _start(self) -> Event:
        allocations = self.nodes.allocations
        environments = rank_environments(self.job, self.number, allocations, self.nodes.facts, self.nodes.free_port())
        pids = self.nodes.start(self.number, environments)
        ranks = [{"rank": rank, "pid": pid, "node": node} for rank, (pid, node) in enumerate(zip(pids, self._node_by_rank, strict=True))]
        return self._event("attempt-started", ranks=ranks)

    def _end(self, statuses: Sequence[RankStatus]) -> Generator[Event, None, Outcome | None]:
        """End the attempt if ranks have exited or a stop is requested; return None if it continues."""
        exited = [status for status in statuses if status.code is not None]
        if _failed(exited):
            return (yield from self._crash())
        if self.requests.stop_signal or any(status.code in STOPPED for status in exited):
            return (yield from self._stop())
        return Completed() if statuses and len(exited) == len(statuses) else None

    def _crash(self) -> Generator[Event, None, Failure]:
        """Find the rank that failed first, and kill the others at once: only what is on disk counts."""
        noticed = time.time()
        status = first_failure(_failed(self.nodes.poll(0)))
        for check in range(SETTLE_CHECKS):
            if (status.code or 0) < 0 or (check and not is_peer_failure(status)):
                break
            time.sleep(SETTLE_TIME)
            status = first_failure(_failed(self.nodes.poll(0)))
        self.nodes.kill()
        yield self._rank_failed(status, noticed)
        return failure_of(status)

    def _hang(self, statuses: Sequence[RankStatus], limits: HangLimits) -> Generator[Event, None, Failure]:
        failure = detect_hang(statuses, limits, waiting=self.nodes.dump_stacks())
        assert failure is not None
        self.nodes.kill()
        yield self._event("rank-failed", code=None, **self._failure_details(failure))
        return failure

    def _stop(self) -> Generator[Event, None, Completed | Stopped]:
        self.nodes.terminate()
        requested = self.requests.stop_signal
        yield self._event("leaving", signal=requested.name if requested else None, grace=self.config.grace_period)
        deadline = time.monotonic() + self.config.grace_period
        statuses = self.nodes.poll(0)
        while any(status.code is None for status in statuses) and time.monotonic() < deadline and not self.requests.at_once:
            statuses = self.nodes.poll(self._poll_interval)
            if _failed(statuses):
                deadline = min(deadline, time.monotonic() + FAILED_GRACE)
            yield self._progress(statuses)
        self.nodes.kill()
        failed = _failed(statuses)
        if unsaved := [status for status in statuses if status in failed or status.error]:
            yield self._rank_failed(first_failure(unsaved), time.time())
        codes = {status.code for status in statuses}
        return Completed() if codes == {ExitCode.DONE} else Stopped(saved=codes <= {ExitCode.DONE, ExitCode.SAVED})

    def _reason_to_reallocate(self, *, all_stepped: bool) -> Event | None:
        if self.capacity.is_head_lost:
            return self._event("head-lost")
        if not all_stepped:
            return None
        if (draining := self.capacity.draining_machines(self.nodes.allocations)) or self.capacity.is_own_node_draining:
            own_node = self.capacity.is_own_node_draining
            return self._event("nodes-draining", nodes=[str(machine) for machine in draining], here=own_node)
        if larger := self.capacity.find_larger_placement(self.nodes.allocations):
            return self._event("nodes-appeared", ranks=larger.ranks, nodes=[str(node.machine) for node in larger.nodes])
        return None

    def _reallocate(self) -> Generator[Event, None, Completed | Stopped | Reallocated]:
        outcome = yield from self._stop()
        can_resume_here = not self.requests.stop_signal and not self.capacity.is_own_node_draining
        return Reallocated() if isinstance(outcome, Stopped) and can_resume_here else outcome

    def _rank_failed(self, status: RankStatus, noticed: float) -> Event:
        return self._event(
            "rank-failed",
            code=status.code,
            phase=status.phase,
            **self._failure_details(failure_of(status)),
            traceback=status.error.traceback if status.error else status.tail,
            noticed_after=round(noticed - status.exited_at, 3),
        )

    @property
    def _node_by_rank(self) -> list[int]:
        return [number for number, node in enumerate(self.nodes.allocations) for _ in range(node.ranks)]

    def _failure_details(self, failure: Failure) -> dict[str, Any]:
        """Return an event's fields about a failure and the machine of its rank."""
        machine = self.nodes.allocations[self._node_by_rank[failure.rank or 0]].machine
        about = {"rank": failure.rank, "cause": failure.cause.name, "message": failure.message, "step": failure.step}
        return about | location(machine)

    @property
    def _poll_interval(self) -> float:
        return max(POLL_INTERVAL, 0.001 * len(self.nodes.allocations))

    def _progress(self, statuses: Sequence[RankStatus]) -> Event:
        names = ("rank", "step", "phase", "has_stepped", "unwritten", "disk_error", "silent_seconds")
        hosts = [node.machine.host for node in self.nodes.allocations for _ in range(node.ranks)]
        ranks = [{name: getattr(status, name) for name in names} | {"node": hosts[status.rank]} for status in statuses]
        return self._event(POLL, ranks=ranks)

    def _event(self, kind: str, **details: Any) -> Event:
        return Event(kind=kind, attempt=self.number, time=time.time(), details=details)


def is_one_machine_without_gpus(nodes: Sequence[NodeAllocation]) -> bool:
    """Whether all ranks share the cores of one machine. A local Ray does not count GPUs, so this machine's are counted here."""
    return len({node.machine.host for node in nodes}) == 1 and not any(node.machine.gpus for node in nodes) and not gpus()


def location(machine: Machine) -> dict[str, str]:
    """Return an event's fields that name a machine."""
    return {"host": machine.host, "address": machine.address, "machine": machine.id}


def _failed(statuses: Sequence[RankStatus]) -> list[RankStatus]:
    return [status for status in statuses if status.code not in STOPPED | {None, ExitCode.DONE}]


def version_differences(job: Job, facts: NodeFacts) -> list[str]:
    """Describe the packages that a node has in another version than the controller's machine."""
    return [
        f"{package} {version or 'is not installed'} (here {expected})"
        for package, expected in job.packages
        if (version := facts["versions"].get(package, expected)) != expected
    ]


def unfit_reason(job: Job, facts: NodeFacts) -> str | None:
    """Return why a node can run no ranks; None if it can."""
    node = f"{facts['host']} ({facts['address']})"
    for package, expected in job.packages[:1]:
        if (version := facts["versions"].get(package)) != expected:
            return f"{node}: expected {package} {expected}, as on this machine, got {version}. Install it there."
    if facts["directory_token"] != job.directory_token.read_text(encoding="utf-8"):
        return f"{job.directory}: expected a directory that all nodes share, got one that {node} does not see. Put run.dir on a shared one."
    return None


def rank_environments(
    job: Job, attempt: int, nodes: Sequence[NodeAllocation], facts: Sequence[NodeFacts], port: int
) -> list[list[dict[str, str]]]:
    """Return each node's ranks' environment variables. Ranks are numbered along the nodes; rank 0's store listens on `port`."""
    world_size = sum(node.ranks for node in nodes)
    ranks = iter(range(world_size))
    return [
        [
            {
                "RANK": str(next(ranks)),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(local_rank),
                "LOCAL_WORLD_SIZE": str(node.ranks),
                "MASTER_ADDR": facts[0]["address"],
                "MASTER_PORT": str(port),
                Env.ATTEMPT: str(attempt),
                **job.environment_by_size.get(world_size, {}),
            }
            for local_rank in range(node.ranks)
        ]
        for node in nodes
    ]
