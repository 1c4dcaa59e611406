"""Is there room for the run? What nodes there are, which of them are used, and whether to wait for more."""

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from manta.cluster.config import ClusterConfig
from manta.cluster.job import Job
from manta.cluster.nodes.placement import Machine, Place, Placement, place
from manta.cluster.supervise.failure import Failure, without_progress

SETTLE = 10.0  # seconds that nodes are waited for which the run would take, but does not need
LOOK = 2.0  # seconds between two looks for nodes that have come
STRIKES = 2  # failures on one machine, with no progress between them, after which it is left out


class Room:
    """Asks Ray, which has to be connected."""

    def __init__(self, job: Job, config: ClusterConfig) -> None:
        self._job, self._config = job, config
        self._there: list[Machine] = []
        self._suspects: Mapping[str, float] = {}
        self.going: set[str] = set()  # ids of machines that are to be taken away, or were
        self._looked = self._asked = 0.0
        self._more: tuple[int, float] = (0, 0.0)
        self._is_settled = False  # of a Ray just started, or joined, nodes come one by one

    def enough(self, waited: float, *, suspects: Mapping[str, float], has_begun: bool) -> Placement | None:
        """What to run on now; None where it is better to wait. Raises PlacementError."""
        self._there = self.left(suspects)
        placement = self._place(self._there, fewer=has_begun)
        if placement is None or len(self._there) < (self._config.min_nodes_to_continue if has_begun else self._config.min_nodes):
            return None
        if not self._is_settled and len(self._there) < self._config.max_nodes and waited < SETTLE:
            return None
        self._is_settled = True
        return placement

    def missing(self) -> str:
        """What is waited for."""
        there = ", ".join(map(str, self._there)) or "none"
        return f"cluster.nodes: got {len(self._there)} nodes ({there}), wants {self._config.nodes}"

    def for_more(self, places: Sequence[Place]) -> Placement | None:
        """A placement of more ranks than these, where nodes have come for it that stayed a while."""
        now = time.monotonic()
        if len(places) >= self._config.max_nodes or now - self._looked < LOOK:
            return None
        self._looked = now
        placement = self._place(self._look())
        if placement is None or placement.ranks <= sum(place.ranks for place in places):
            self._more = (0, now)
            return None
        if placement.ranks != self._more[0]:
            self._more = (placement.ranks, now)
        return placement if now - self._more[1] >= LOOK else None

    def to_go(self, places: Sequence[Place]) -> list[Machine]:
        """Those of these that are to be taken away. Ray is asked now and then."""
        if time.monotonic() - self._asked >= LOOK:
            self._ask()
        return [place.machine for place in places if place.machine.id in self.going]

    @property
    def is_headless(self) -> bool:
        """Whether Ray can not be asked any more: it has to be started anew."""
        from manta.cluster.ray.view import is_headless

        return is_headless()

    @property
    def must_leave(self) -> bool:
        """Whether the node that this process is on is to be taken away: then the run has to go on from elsewhere."""
        from manta.cluster.ray.view import here

        return bool(self.going) and here() in self.going

    def left(self, suspects: Mapping[str, float]) -> list[Machine]:
        """Those that can be used."""
        self._suspects = suspects
        return self._look()

    def leave_out(self, history: Sequence[Failure]) -> set[str]:
        """Machines on which the run has failed again and again, as long as it can do without them."""
        struck = Counter(failure.machine for failure in without_progress(history) if failure.machine)
        out = {machine for machine, strikes in struck.items() if strikes >= STRIKES} - self._distrusted
        left = [machine for machine in self._there if machine.id not in out]
        return out if len(left) >= self._config.min_nodes_to_continue and self._place(left) is not None else set()

    def _look(self) -> list[Machine]:
        from manta.cluster.ray.view import machines  # it imports Ray, which must wait until its environment stands

        self._ask()
        out = self.going | self._distrusted
        return [machine for machine in machines() if machine.id not in out]

    @property
    def _distrusted(self) -> set[str]:
        return {machine for machine, until in self._suspects.items() if time.time() < until}

    def _ask(self) -> None:
        from manta.cluster.ray.view import draining

        self._asked = time.monotonic()
        self.going |= draining()

    def _place(self, there: Collection[Machine], *, fewer: bool = False) -> Placement | None:
        sizes = self._job.sizes + (self._job.fewer if fewer else ())
        return place(there, most=self._config.max_nodes, sizes=sizes, ranks_per_node=self._job.ranks_per_node)
