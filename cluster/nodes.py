"""The nodes of a run: one agent on each, spoken to all at once. The only file that talks to Ray's actors.

It is imported when Ray has been started: Ray reads its environment at import.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.util
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from manta.cluster.agent import NodeAgent, NodeFacts
from manta.cluster.failure import RankStatus
from manta.cluster.job import Job

ANSWER = 30.0  # seconds in which an agent must answer; one that does not is as good as dead


class NodeLostError(RuntimeError):
    """A node's agent is gone, and its ranks with it."""

    def __init__(self, node: int, reason: str) -> None:
        super().__init__(node, reason)
        self.node = node
        self.reason = reason

    def __str__(self) -> str:
        return f"node {self.node}: {self.reason}"


@dataclass(slots=True)
class _Node:
    agent: Any
    sentinel: ray.ObjectRef[None]
    facts: NodeFacts | None = None
    poll: Any = None
    asked: float = 0.0
    ranks: tuple[RankStatus, ...] = ()


class Nodes:
    """Agents, one a node, each told to warm its processes as soon as it exists: they import while ports are still being found."""

    def __init__(self, job: Job, *, address: str, scratch: Path) -> None:
        self._job = job
        self._address = address
        self._scratch = scratch
        self._group = ray.util.placement_group([{"CPU": 1} for _ in range(job.nodes)], strategy="STRICT_SPREAD")
        self._nodes = [self._start(index) for index in range(job.nodes)]

    @property
    def facts(self) -> list[NodeFacts]:
        return [node.facts for node in self._nodes if node.facts is not None]

    def welcome(self) -> list[tuple[int, NodeFacts]]:
        """Wait for the agents that are new, and learn where they are."""
        new = [(index, node, node.agent.describe.remote()) for index, node in enumerate(self._nodes) if node.facts is None]
        for index, node, ref in new:
            node.facts = self._answer(index, ref)
        return [(index, node.facts) for index, node, _ in new if node.facts is not None]

    def start(self, attempt: int, places: list[list[dict[str, str]]]) -> list[int]:
        """Process ids by rank. `places` holds the environments of each node's ranks."""
        for node in self._nodes:
            node.poll, node.ranks = None, ()
        return [pid for pids in self._ask("start", *((attempt, on_node) for on_node in places)) for pid in pids]

    def free_port(self) -> int:
        """A free port on the first node."""
        return self._answer(0, self._nodes[0].agent.free_port.remote())

    def warm(self) -> None:
        self._tell("warm")

    def terminate(self) -> None:
        self._tell("terminate")

    def dump_stacks(self) -> None:
        self._tell("dump_stacks")

    def kill(self) -> None:
        """End all ranks, and return when they are gone."""
        self._ask("kill")

    def poll(self, wait: float) -> list[RankStatus]:
        """The latest known of every rank; at once when some node has news, else after about `wait` seconds.

        NodeLostError when an agent has died, or has not answered for long.
        """
        for node in self._nodes:
            if node.poll is None:
                node.poll, node.asked = node.agent.poll.remote(wait), time.monotonic()
        waited_for = [ref for node in self._nodes for ref in (node.poll, node.sentinel)]
        ready, _ = ray.wait(waited_for, num_returns=1, timeout=wait + 0.1)
        for index, node in enumerate(self._nodes):
            if node.sentinel in ready:
                self._answer(index, node.sentinel)
            if node.poll in ready:
                node.ranks, node.poll = tuple(self._answer(index, node.poll)), None
            elif time.monotonic() - node.asked > wait + ANSWER:
                raise NodeLostError(index, f"its agent has not answered for {ANSWER:.0f} s")
        return [status for node in self._nodes for status in node.ranks]

    @property
    def have_machines(self) -> bool:
        """Whether Ray has as many machines as there are nodes (it learns of a dead one when it tells of its agent's death, or later)."""
        return sum(machine["Alive"] for machine in ray.nodes()) >= len(self._nodes)

    def replace(self, index: int) -> None:
        """A new agent in place of a lost one. The old one's ranks die with it, if it still lives; those elsewhere are of no use."""
        ray.kill(self._nodes[index].agent)
        self._nodes[index] = self._start(index)
        self._tell("kill")

    def close(self) -> None:
        """Leave nothing behind, whatever state the agents are in."""
        closing = [node.agent.close.remote() for node in self._nodes]
        ray.wait(closing, num_returns=len(closing), timeout=2.0)
        for node in self._nodes:
            ray.kill(node.agent)

    def _start(self, index: int) -> _Node:
        placed = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        agent: Any = (
            ray.remote(NodeAgent)
            .options(num_cpus=1, scheduling_strategy=placed)
            .remote(
                address=self._address,
                command=self._job.command,
                environment=self._job.environment,
                directory=self._job.directory,
                ranks=self._job.ranks_on(index),
                scratch=self._scratch,
            )
        )
        agent.follow_raylet.remote()
        agent.warm.remote()
        return _Node(agent=agent, sentinel=agent.sentinel.remote())

    def _tell(self, method: str) -> None:
        for node in self._nodes:
            getattr(node.agent, method).remote()

    def _ask(self, method: str, *arguments: tuple[Any, ...]) -> list[Any]:
        """Call `method` on every agent, with arguments of its own if there are any, and wait for all answers."""
        each = arguments or ((),) * len(self._nodes)
        asked = [getattr(node.agent, method).remote(*own) for node, own in zip(self._nodes, each, strict=True)]
        return [self._answer(index, ref) for index, ref in enumerate(asked)]

    def _answer(self, index: int, ref: Any) -> Any:
        try:
            return ray.get(ref, timeout=ANSWER)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise NodeLostError(index, f"its agent is gone ({type(error).__name__})") from error
