"""The nodes of a run: one agent on each, spoken to all at once. The only file that talks to actors of Ray's.

It is imported when Ray has been started: Ray reads its environment at import.
"""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from manta.cluster.job import Job
from manta.cluster.nodes.agent import NodeAgent, NodeFacts
from manta.cluster.nodes.placement import Place, Placement
from manta.cluster.ray.view import is_headless
from manta.cluster.supervise.failure import RankStatus

FEW = 16  # nodes whose answers are taken one by one
BATCH = 0.05  # seconds in which those of more nodes are gathered
COMING = 30.0  # seconds that a new agent has to come up
SEES_ALL = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # an agent that holds no GPU hands all of them to its ranks


class NodeLostError(RuntimeError):
    """A node's agent is gone, and its ranks with it; or it `is_silent`, and as good as gone."""

    def __init__(self, node: int, reason: str, *, is_silent: bool = False) -> None:
        super().__init__(node, reason)
        self.node, self.reason, self.is_silent = node, reason, is_silent

    def __str__(self) -> str:
        return f"node {self.node}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Agent:
    """`up` is answered when it has come up, `sentinel` when it has died. One of a node's two `holds` what Ray counts of it."""

    actor: Any
    up: ray.ObjectRef[None]
    sentinel: ray.ObjectRef[None]
    holds: bool

    @property
    def has_died(self) -> bool:
        return bool(ray.wait([self.sentinel], timeout=0)[0])

    @property
    def is_there(self) -> bool:
        return bool(ray.wait([self.up], timeout=0)[0]) and not self.has_died


@dataclass(slots=True)
class _Node:
    """`agent` has the ranks; the `understudy`, where there is one, has the spares: so an agent's death does not cost both."""

    place: Place
    sharing: int
    agent: _Agent
    understudy: _Agent | None = None
    facts: NodeFacts | None = None
    poll: Any = None
    asked: float = 0.0
    ranks: tuple[RankStatus, ...] = ()


def alone(actor: type, machine: str) -> Any:
    """An actor of a plain class on a machine, by its id; it takes no room there."""
    strategy = NodeAffinitySchedulingStrategy(machine, soft=False)
    return ray.remote(actor).options(num_cpus=0, scheduling_strategy=strategy).remote()


class Nodes:
    """Agents, one a node, each told to warm its processes as soon as it exists: they import while ports are still being found.

    Once ranks step, another stands by on each node, with spares, and takes over at the next start: then they change places.
    """

    def __init__(self, job: Job, *, scratch: Path | None, timeout: float) -> None:
        """timeout: seconds in which an agent must answer; one that does not is as good as dead."""
        self._job, self._scratch, self._timeout = job, scratch, timeout
        self._nodes: list[_Node] = []
        self._attempt = 0
        self._left: dict[str, _Agent] = {}  # understudies of agents that are lost, by machine

    @property
    def facts(self) -> list[NodeFacts]:
        return [node.facts for node in self._nodes if node.facts is not None]

    @property
    def places(self) -> list[Place]:
        return [node.place for node in self._nodes]

    def take(self, placement: Placement) -> None:
        """Have an agent on each machine of the placement, and on no other. Those that stay keep what they have warm."""
        before = {node.place.machine.id: node for node in self._nodes}
        hosts = Counter[str]()
        for place in placement.places:
            hosts[place.machine.host] += place.ranks
        self._nodes = []
        for place in placement.places:
            node = before.pop(place.machine.id, None) or self._begin(place, sharing=hosts[place.machine.host])
            node.place = place
            self._nodes.append(node)
        self._end(list(before.values()))
        for agent in self._left.values():  # on machines that are not trusted any more: they may never answer
            _kill(agent)
        self._left = {}

    def welcome(self) -> list[tuple[int, NodeFacts]]:
        """Wait for the agents that are new, and learn where they are."""
        asked = ([package for package, _ in self._job.packages], self._job.seal)
        new = [(index, node, node.agent.actor.describe.remote(*asked)) for index, node in enumerate(self._nodes) if node.facts is None]
        for index, node, ref in new:
            node.facts = self._answer(index, ref, within=max(self._timeout, COMING))
        return [(index, node.facts) for index, node, _ in new if node.facts is not None]

    def start(self, attempt: int, places: list[list[dict[str, str]]]) -> list[int]:
        """Process ids by rank. `places` holds the environments of each node's ranks."""
        if any(node.understudy for node in self._nodes):
            self.kill()
        self._attempt = attempt
        for node in self._nodes:
            node.poll, node.ranks = None, ()
            if node.understudy is not None and node.understudy.is_there:
                node.agent, node.understudy = node.understudy, node.agent
        return [pid for pids in self._ask("start", *((attempt, on_node) for on_node in places)) for pid in pids]

    def free_port(self) -> int:
        """A free port on the first node."""
        return self._answer(0, self._nodes[0].agent.actor.free_port.remote())

    def stand_by(self) -> None:
        """Have spares, and on each node an agent of their own for them."""
        for node in self._nodes:
            if node.understudy is None or node.understudy.has_died:
                node.understudy = self._start(node.place, sharing=node.sharing, holds=not node.agent.holds)
        self.warm()

    def warm(self) -> None:
        for node in self._nodes:
            (node.understudy or node.agent).actor.warm.remote(node.place.ranks, self._attempt)

    def terminate(self) -> None:
        self._tell("terminate")
        for node in self._nodes:
            if node.understudy is not None:
                node.understudy.actor.terminate.remote()

    def dump_stacks(self) -> set[int]:
        """All ranks write down where they stand. Those that wait in a collective."""
        return {rank for ranks in self._ask("dump_stacks") for rank in ranks}

    def kill(self) -> None:
        """End all ranks, and return when they are gone."""
        self._ask("kill")

    def poll(self, wait: float) -> list[RankStatus]:
        """The latest known of every rank; at once when some node has news, else after about `wait` seconds.

        Agents answer when they have news, or have waited themselves. Of many nodes the answers are taken together, some at a time.
        NodeLostError when an agent has died, or has not answered for long.
        """
        until = time.monotonic() + wait
        while not self._hear(wait) and time.monotonic() < until and len(self._nodes) > FEW:
            pass
        return [status for node in self._nodes for status in node.ranks]

    def _hear(self, wait: float) -> bool:
        """Takes the answers that are there, or come soon. Whether a rank has ended that had not before."""
        for node in self._nodes:
            if node.poll is None:
                node.poll, node.asked = node.agent.actor.poll.remote(wait), time.monotonic()
        refs = [ref for node in self._nodes for ref in (node.poll, node.agent.sentinel)]
        few = len(self._nodes) <= FEW
        ready = set(ray.wait(refs, num_returns=1 if few else len(refs), timeout=wait + 0.1 if few else min(wait, BATCH))[0])
        now, news = time.monotonic(), False
        for index, node in enumerate(self._nodes):
            if node.agent.sentinel in ready:
                self._answer(index, node.agent.sentinel)
            if node.poll in ready:
                before = sum(status.code is not None for status in node.ranks)
                node.ranks, node.poll = tuple(self._answer(index, node.poll)), None
                news = news or sum(status.code is not None for status in node.ranks) > before
            elif now - node.asked > wait + self._timeout:
                raise self._silent(index)
        return news

    def drop(self, index: int) -> Place:
        """Let go of a lost node. Its ranks die with its agent, if it still lives; those elsewhere are of no use."""
        lost = self._nodes.pop(index)
        _kill(lost.agent)
        if lost.understudy is not None and lost.understudy.is_there:
            self._left[lost.place.machine.id] = lost.understudy
        elif lost.understudy is not None:
            _kill(lost.understudy)
        self._tell("kill")
        return lost.place

    def close(self) -> None:
        """Leave nothing behind, whatever state the agents are in."""
        nodes, self._nodes = self._nodes, []
        self._end(nodes)

    def _begin(self, place: Place, *, sharing: int) -> _Node:
        agent = self._left.pop(place.machine.id, None) or self._start(place, sharing=sharing, holds=True)
        agent.actor.warm.remote(place.ranks, self._attempt)
        return _Node(place, sharing, agent)

    def _start(self, place: Place, *, sharing: int, holds: bool) -> _Agent:
        machine = place.machine
        actor: Any = (
            ray.remote(NodeAgent)
            .options(
                num_cpus=int(holds),
                num_gpus=machine.gpus if holds else 0,
                runtime_env=None if holds or not machine.gpus else {"env_vars": SEES_ALL},
                scheduling_strategy=NodeAffinitySchedulingStrategy(machine.id, soft=False),
            )
            .remote(
                address=machine.address,
                program=self._job.program,
                environment=self._job.environment,
                directory=self._job.directory,
                sharing=sharing,
                scratch=self._scratch,
            )
        )
        return _Agent(actor=actor, up=actor.follow_raylet.remote(), sentinel=actor.sentinel.remote(), holds=holds)

    @staticmethod
    def _end(nodes: list[_Node]) -> None:
        agents = [agent for node in nodes for agent in (node.agent, node.understudy) if agent is not None]
        closing = [agent.actor.close.remote() for agent in agents]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=2.0)
        for agent in agents:
            _kill(agent)

    def _tell(self, method: str) -> None:
        for node in self._nodes:
            getattr(node.agent.actor, method).remote()

    def _ask(self, method: str, *arguments: tuple[Any, ...]) -> list[Any]:
        """Call `method` on every agent, with arguments of its own if there are any, and wait for all answers."""
        each = arguments or ((),) * len(self._nodes)
        asked = [getattr(node.agent.actor, method).remote(*own) for node, own in zip(self._nodes, each, strict=True)]
        return [self._answer(index, ref) for index, ref in enumerate(asked)]

    def _answer(self, index: int, ref: Any, within: float | None = None) -> Any:
        try:
            return ray.get(ref, timeout=within or self._timeout)
        except ray.exceptions.GetTimeoutError as error:
            raise self._silent(index) from error
        except (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError) as error:
            raise NodeLostError(index, f"its agent is gone ({type(error).__name__})") from error

    def _silent(self, index: int) -> NodeLostError:
        return NodeLostError(index, f"its agent has not answered for {self._timeout:g} s", is_silent=True)


def _kill(agent: _Agent) -> None:
    if not is_headless():  # else it goes with its raylet
        ray.kill(agent.actor)
