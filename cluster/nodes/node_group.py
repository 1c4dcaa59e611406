"""The nodes of a run: one agent on each, all called at once. The only module that calls Ray actors.

Import it after Ray has started: Ray reads its environment when it is imported.
"""

import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from manta.cluster.job import Job
from manta.cluster.nodes.agent import NodeAgent
from manta.cluster.nodes.placement import NodeAllocation, Placement
from manta.cluster.nodes.report import NodeFacts, RankStatus
from manta.cluster.ray.view import is_head_lost

FEW = 16  # nodes for which answers are taken one by one
BATCH_TIME = 0.05  # seconds in which the answers of more nodes are collected
AGENT_START_TIMEOUT = 30.0  # seconds
SEE_ALL_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # an agent that reserves no GPU still passes all of them to its ranks


class NodeLostError(RuntimeError):
    """A node's agent has died, and its ranks with it; or, if `is_silent`, it does not answer."""

    def __init__(self, node: int, reason: str, *, is_silent: bool = False) -> None:
        super().__init__(f"node {node}: {reason}")
        self.node, self.reason, self.is_silent = node, reason, is_silent


@dataclass(frozen=True, slots=True, kw_only=True)
class _Agent:
    """`started` is answered once the agent has started, `sentinel` when it has died. Of a node's two agents one `reserves` the node."""

    actor: Any
    started: ray.ObjectRef[None]
    sentinel: ray.ObjectRef[None]
    reserves: bool

    @property
    def has_died(self) -> bool:
        return bool(ray.wait([self.sentinel], timeout=0)[0])

    @property
    def is_ready(self) -> bool:
        return bool(ray.wait([self.started], timeout=0)[0]) and not self.has_died


@dataclass(slots=True)
class _Node:
    """`agent` has the ranks; `standby`, if there is one, has the standby processes: so an agent's death does not cost both."""

    allocation: NodeAllocation
    ranks_on_host: int
    agent: _Agent
    standby: _Agent | None = None
    facts: NodeFacts | None = None
    pending: Any = None  # the answer to the last poll
    polled_at: float = 0.0
    statuses: tuple[RankStatus, ...] = ()

    @property
    def agents(self) -> list[_Agent]:
        return [self.agent] if self.standby is None else [self.agent, self.standby]

    @property
    def ended_ranks(self) -> int:
        return sum(status.code is not None for status in self.statuses)


def on_machine(actor_or_task: Any, machine: str, **options: Any) -> Any:
    """Return a plain class or function as a Ray actor or task of a machine, by its id. Without options it reserves nothing."""
    strategy = NodeAffinitySchedulingStrategy(machine, soft=False)
    return ray.remote(actor_or_task).options(scheduling_strategy=strategy, **{"num_cpus": 0, **options})


class NodeGroup:
    """Starts an agent on each node of a placement, and forwards the controller's calls to all of them.

    An agent warms its processes as soon as it has started: they import while the attempt is still being set up. Once ranks step, each node
    gets a second agent with standby processes; at the next start the two swap roles.
    """

    def __init__(self, job: Job, *, scratch: Path | None, timeout: float) -> None:
        """timeout: seconds after which an agent that does not answer counts as lost."""
        self._job, self._scratch, self._timeout = job, scratch, timeout
        self._nodes: list[_Node] = []
        self._attempt = 0
        self._orphaned: dict[str, _Agent] = {}  # standby agents of lost nodes, by machine

    @property
    def facts(self) -> list[NodeFacts]:
        return [node.facts for node in self._nodes if node.facts is not None]

    @property
    def allocations(self) -> list[NodeAllocation]:
        return [node.allocation for node in self._nodes]

    def allocate(self, placement: Placement) -> None:
        """Have an agent on each machine of the placement and on no other. Agents that stay keep their standby processes."""
        before = {node.allocation.machine.id: node for node in self._nodes}
        ranks_on_host = Counter[str]()
        for allocation in placement.nodes:
            ranks_on_host[allocation.machine.host] += allocation.ranks
        self._nodes = []
        for allocation in placement.nodes:
            machine = allocation.machine
            node = before.pop(machine.id, None) or self._start_node(allocation, ranks_on_host[machine.host])
            node.allocation = allocation
            self._nodes.append(node)
        self._close_nodes(list(before.values()))
        for agent in self._orphaned.values():  # on excluded machines: they may never answer
            _kill(agent)
        self._orphaned = {}

    def have_started(self, wait: float) -> bool:
        """Whether all agents have started, or failed to, within some seconds."""
        new = [node.agent.started for node in self._nodes if node.facts is None]
        return not new or len(ray.wait(new, num_returns=len(new), timeout=wait)[0]) == len(new)

    def describe_new(self) -> list[tuple[int, NodeFacts]]:
        """Wait for new agents to start; return their nodes' numbers and facts."""
        question = [package for package, _ in self._job.packages], self._job.directory_token
        new = [(index, node, node.agent.actor.describe.remote(*question)) for index, node in enumerate(self._nodes) if node.facts is None]
        for index, node, answer in new:
            try:
                node.facts = self._get(index, answer, timeout=max(self._timeout, AGENT_START_TIMEOUT))
            except (NodeLostError, ray.exceptions.RayTaskError) as error:
                node.facts = self._facts_without_agent(index, error)
        return [(index, node.facts) for index, node, _ in new if node.facts is not None]

    def _facts_without_agent(self, index: int, error: Exception) -> NodeFacts:
        """Return facts about a node whose agent failed to start, if another version of manta is installed there; else raise the error."""
        has_raised = isinstance(error, ray.exceptions.RayTaskError) or getattr(error.__cause__, "actor_init_failed", False)
        if not has_raised or not self._job.packages:
            raise error
        machine, (package, expected) = self._nodes[index].allocation.machine, self._job.packages[0]
        try:
            installed = self._get(index, on_machine(version, machine.id, max_retries=0).remote(package))
        except PackageNotFoundError:
            installed = None
        if installed == expected:
            raise error
        return NodeFacts(host=machine.host, address=machine.address, versions={package: installed}, directory_token="")

    def start(self, attempt: int, environments: list[list[dict[str, str]]]) -> list[int]:
        """Start the ranks of an attempt; return their process ids. environments: of each node's ranks."""
        if any(node.standby for node in self._nodes):
            self.kill()
        self._attempt = attempt
        for node in self._nodes:
            node.pending, node.statuses = None, ()
            if node.standby is not None and node.standby.is_ready:
                node.agent, node.standby = node.standby, node.agent
        return [pid for pids in self._call_all("start", *((attempt, on_node) for on_node in environments)) for pid in pids]

    def free_port(self) -> int:
        """Return a free port on the first node."""
        return self._get(0, self._nodes[0].agent.actor.free_port.remote())

    def start_standby(self) -> None:
        """Have on each node a second agent with standby processes."""
        for node in self._nodes:
            if node.standby is None or node.standby.has_died:
                node.standby = self._start_agent(node.allocation, node.ranks_on_host, reserves=not node.agent.reserves)
        self.fill_standby()

    def fill_standby(self) -> None:
        for node in self._nodes:
            (node.standby or node.agent).actor.fill_standby.remote(node.allocation.ranks, self._attempt)

    def terminate(self) -> None:
        """Ask the ranks to save and exit."""
        for agent in [agent for node in self._nodes for agent in node.agents]:
            agent.actor.terminate.remote()

    def dump_stacks(self) -> set[int]:
        """Have all ranks log their stack traces; return the ranks that wait in a collective."""
        return {rank for ranks in self._call_all("dump_stacks") for rank in ranks}

    def kill(self) -> None:
        """Kill all ranks; return when they are gone."""
        self._call_all("kill")

    def poll(self, wait: float) -> list[RankStatus]:
        """Return the newest status of every rank: at once after a rank exited, else after about `wait` seconds.

        Agents answer when something changed, or after `wait`. Of many nodes, answers are collected in batches.
        Raises NodeLostError if an agent has died, or has not answered in time.
        """
        deadline = time.monotonic() + wait
        while not self._collect(wait) and time.monotonic() < deadline and len(self._nodes) > FEW:
            pass
        return [status for node in self._nodes for status in node.statuses]

    def _collect(self, wait: float) -> bool:
        """Take the answers that are ready, or soon will be; return whether another rank has ended."""
        for node in self._nodes:
            if node.pending is None:
                node.pending, node.polled_at = node.agent.actor.poll.remote(wait), time.monotonic()
        answers = [answer for node in self._nodes for answer in (node.pending, node.agent.sentinel)]
        few = len(self._nodes) <= FEW
        ready = set(ray.wait(answers, num_returns=1 if few else len(answers), timeout=wait + 0.1 if few else min(wait, BATCH_TIME))[0])
        now, has_ended = time.monotonic(), False
        for index, node in enumerate(self._nodes):
            if node.agent.sentinel in ready:
                self._get(index, node.agent.sentinel)
            if node.pending in ready:
                before = node.ended_ranks
                node.statuses, node.pending = tuple(self._get(index, node.pending)), None
                has_ended = has_ended or node.ended_ranks > before
            elif now - node.polled_at > wait + self._timeout:
                raise self._silent(index)
        return has_ended

    def drop(self, index: int) -> NodeAllocation:
        """Remove a lost node and kill the ranks of the others, which are of no use without it."""
        lost = self._nodes.pop(index)
        _kill(lost.agent)
        if lost.standby is not None and lost.standby.is_ready:
            self._orphaned[lost.allocation.machine.id] = lost.standby
        elif lost.standby is not None:
            _kill(lost.standby)
        for node in self._nodes:
            node.agent.actor.kill.remote()
        return lost.allocation

    def close(self) -> None:
        """End all agents and their processes, whatever state they are in."""
        self._close_nodes(self._nodes)

    def _start_node(self, allocation: NodeAllocation, ranks_on_host: int) -> _Node:
        agent = self._orphaned.pop(allocation.machine.id, None) or self._start_agent(allocation, ranks_on_host, reserves=True)
        agent.actor.fill_standby.remote(allocation.ranks, self._attempt)
        return _Node(allocation, ranks_on_host, agent)

    def _start_agent(self, allocation: NodeAllocation, ranks_on_host: int, *, reserves: bool) -> _Agent:
        machine = allocation.machine
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": machine.gpus}
        if not reserves:
            options = {"num_gpus": 0, "runtime_env": {"env_vars": SEE_ALL_GPUS} if machine.gpus else None}
        actor = on_machine(NodeAgent, machine.id, **options).remote(  # plain values: a node may have another version of Job
            program=self._job.program,
            environment=self._job.environment,
            directory=self._job.directory,
            address=machine.address,
            host_ranks=ranks_on_host,
            scratch=self._scratch,
        )
        return _Agent(actor=actor, started=actor.follow_raylet.remote(), sentinel=actor.sentinel.remote(), reserves=reserves)

    @staticmethod
    def _close_nodes(nodes: list[_Node]) -> None:
        agents = [agent for node in nodes for agent in node.agents]
        if closing := [agent.actor.close.remote() for agent in agents]:
            ray.wait(closing, num_returns=len(closing), timeout=2.0)
        for agent in agents:
            _kill(agent)

    def _call_all(self, method: str, *arguments: tuple[Any, ...]) -> list[Any]:
        """Call `method` on every agent, with its own arguments if there are any, and wait for all answers."""
        per_node = arguments or ((),) * len(self._nodes)
        answers = [getattr(node.agent.actor, method).remote(*own) for node, own in zip(self._nodes, per_node, strict=True)]
        return [self._get(index, answer) for index, answer in enumerate(answers)]

    def _get(self, index: int, answer: Any, timeout: float | None = None) -> Any:
        try:
            return ray.get(answer, timeout=timeout or self._timeout)
        except ray.exceptions.GetTimeoutError as error:
            raise self._silent(index) from error
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, OSError):
                raise
            raise NodeLostError(
                index, f"{error.cause.filename or 'its folder for temporary files'}: {error.cause.strerror}"
            ) from error  # its disk is full
        except ray.exceptions.RayError as error:  # also if its node has no memory or is gone
            raise NodeLostError(index, f"its agent has died ({type(error).__name__})") from error

    def _silent(self, index: int) -> NodeLostError:
        return NodeLostError(index, f"its agent has not answered for {self._timeout:g} s", is_silent=True)


def _kill(agent: _Agent) -> None:
    if not is_head_lost():  # if it is, the agent ends with its raylet
        ray.kill(agent.actor)
