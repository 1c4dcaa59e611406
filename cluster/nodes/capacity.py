"""Which nodes the run can use now, and whether to wait for more.

Import it after Ray has started: Ray reads its environment when it is imported.
"""

import time
from collections.abc import Collection, Mapping, Sequence

import ray

from manta.cluster.config import ClusterConfig
from manta.cluster.job import Job
from manta.cluster.machine import Machine
from manta.cluster.nodes.placement import NodeAllocation, Placement, place_ranks
from manta.cluster.ray import view

SETTLE_TIME = 10.0  # seconds to wait for nodes that the run would use but does not need
POLL_INTERVAL = 2.0  # seconds between two questions to Ray


class Capacity:
    """Tracks the nodes that Ray lists, without those that drain and those that the run excludes."""

    def __init__(self, job: Job, config: ClusterConfig) -> None:
        self._job, self._config = job, config
        self._machines: list[Machine] = []
        self._suspects: Mapping[str, float] = {}
        self.draining: set[str] = set()  # ids of machines that Ray drains or has drained
        self._growth_checked = self._drain_checked = 0.0
        self._larger_ranks, self._larger_since = 0, 0.0
        self._is_settled = False  # nodes of a Ray cluster that was just started or joined appear one by one

    def find_placement(self, waited: float, *, suspects: Mapping[str, float], has_started: bool) -> Placement | None:
        """Return a placement to run on now; None if it is better to wait. Raises PlacementError.

        waited: seconds waited so far. suspects: excluded machines by id, with the time at which they may be used again.
        """
        self._machines = self.usable_machines(suspects)
        placement = self._place(self._machines, allow_fallback=has_started)
        needed = self._config.min_nodes_to_continue if has_started else self._config.min_nodes
        if placement is None or len(self._machines) < needed:
            return None
        if not self._is_settled and len(self._machines) < self._config.max_nodes and waited < SETTLE_TIME:
            return None
        self._is_settled = True
        return placement

    def shortage(self) -> str:
        """Describe what the run waits for."""
        machines = ", ".join(map(str, self._machines)) or "none"
        return f"cluster.nodes: expected {self._config.nodes} nodes, got {len(self._machines)} ({machines})"

    def find_larger_placement(self, nodes: Sequence[NodeAllocation]) -> Placement | None:
        """Return a placement of more ranks than on these nodes, once its nodes have been available for a while."""
        now = time.monotonic()
        if len(nodes) >= self._config.max_nodes or now - self._growth_checked < POLL_INTERVAL:
            return None
        self._growth_checked = now
        placement = self._place(self.usable_machines(self._suspects))
        larger = placement.ranks if placement and placement.ranks > sum(node.ranks for node in nodes) else 0
        if larger != self._larger_ranks:
            self._larger_ranks, self._larger_since = larger, now
        return placement if larger and now - self._larger_since >= POLL_INTERVAL else None

    def draining_machines(self, nodes: Sequence[NodeAllocation]) -> list[Machine]:
        """Return those of these nodes' machines that Ray drains."""
        if time.monotonic() - self._drain_checked >= POLL_INTERVAL:
            self._check_draining()
        return [node.machine for node in nodes if node.machine.id in self.draining]

    @property
    def is_head_lost(self) -> bool:
        """Whether the head of the private Ray cluster is gone, so that Ray must be started again."""
        return view.is_head_lost()

    @property
    def is_own_node_draining(self) -> bool:
        """Whether Ray drains the node of this process: the run must then resume from another one."""
        return bool(self.draining) and ray.get_runtime_context().get_node_id() in self.draining

    def usable_machines(self, suspects: Mapping[str, float]) -> list[Machine]:
        self._suspects = suspects
        self._check_draining()
        excluded = self.draining | self._excluded
        return [machine for machine in view.machines() if machine.id not in excluded]

    def excludable(self, machines: Collection[str]) -> set[str]:
        """Return those of these machines that are not excluded yet, if the run can continue without all of them; else none."""
        excluded = set(machines) - self._excluded
        remaining = [machine for machine in self._machines if machine.id not in excluded]
        can_continue = len(remaining) >= self._config.min_nodes_to_continue and self._place(remaining) is not None
        return excluded if can_continue else set()

    @property
    def _excluded(self) -> set[str]:
        return {machine for machine, until in self._suspects.items() if time.time() < until}

    def _check_draining(self) -> None:
        self._drain_checked = time.monotonic()
        self.draining |= view.draining()

    def _place(self, machines: Collection[Machine], *, allow_fallback: bool = False) -> Placement | None:
        sizes = self._job.sizes + (self._job.fallback_sizes if allow_fallback else ())
        return place_ranks(machines, max_nodes=self._config.max_nodes, sizes=sizes, ranks_per_node=self._job.ranks_per_node)
