"""The `cluster` section of a config: nodes, timeouts and restarts."""

import math
import re
from typing import Annotated

from pydantic import AfterValidator, Field

from manta.cluster.target_config import ClusterSection, Kubernetes, Slurm, Ssh

_DURATION = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
_RANGE = re.compile(r"([1-9]\d*)(?:\.\.([1-9]\d*))?")


def _node_range(nodes: int | str) -> int | str:
    match = _RANGE.fullmatch(str(nodes))
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f"expected a number of nodes or a range, got {nodes!r}. Write 4, or 2..8.")
    return nodes


def _duration(text: str) -> str:
    if _DURATION.fullmatch(text) is None:
        raise ValueError(f"expected hours:minutes:seconds, got {text!r}. Write 3:50:00, or 2-01:00:00 for days.")
    return text


class ClusterConfig(ClusterSection):
    nodes: Annotated[int | str, AfterValidator(_node_range)] = 1
    """Nodes to run on. `4` starts on 4, continues on fewer if some are lost, and returns to 4. `2..8` runs on 2 to 8, as many as are
    available, and waits while fewer than 2 are. On one machine, 2 or more simulate a cluster."""
    ranks_per_node: int | None = Field(default=None, ge=1)
    """Ranks on each node. Unset: one per GPU; without a GPU two, or one on a single core."""
    start_timeout: float = Field(default=600.0, gt=0)
    """Maximum seconds to wait for nodes, and without a heartbeat of a rank before its first step, while it compiles, or while it saves."""
    step_timeout: float | None = Field(default=None, gt=0, examples=[300.0])
    """Maximum seconds between heartbeats during training steps; then the attempt counts as hung. Unset: learned (docs/recovery.md)."""
    node_timeout: float = Field(default=30.0, gt=0)
    """Seconds without a response after which a node counts as lost, and the run continues without it."""
    grace_period: float = Field(default=60.0, ge=0)
    """Seconds the ranks have to save and exit after a stop request."""
    stop_after: Annotated[str, AfterValidator(_duration)] | None = Field(default=None, examples=["3:50:00"])
    """Save and exit with 75 after this time (h:mm:ss): for jobs whose time limit sends no signal."""
    max_restarts_without_progress: int = Field(default=3, ge=0)
    """Give up after this many consecutive restarts without a new highest step."""
    hot_standby: bool = True
    """Keep standby processes with everything imported, so that a restart takes tenths of a second. Costs their memory."""
    keep_logs: int = Field(default=20, ge=1)
    """Number of newest attempts to keep logs of. A rank's log is only appended to, so logrotate (copytruncate) may truncate it."""
    ssh: Ssh = Ssh()
    """How `manta train --on ssh:FILE` reaches its hosts."""
    slurm: Slurm = Slurm()
    """What `manta train --on slurm` requests."""
    kubernetes: Kubernetes = Kubernetes()
    """What `manta train --on kubernetes` creates."""

    @property
    def quarantine(self) -> float:
        """Seconds that a lost node is excluded although Ray, which checks it every second, lists it as alive."""
        return max(60.0, 10 * self.node_timeout)

    @property
    def stop_after_seconds(self) -> float:
        """Infinite if stop_after is unset."""
        if self.stop_after is None:
            return math.inf
        match = _DURATION.fullmatch(self.stop_after)
        assert match is not None
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def min_nodes(self) -> int:
        """Nodes needed to start."""
        return int(str(self.nodes).split("..", maxsplit=1)[0])

    @property
    def max_nodes(self) -> int:
        return int(str(self.nodes).rsplit("..", maxsplit=1)[-1])

    @property
    def min_nodes_to_continue(self) -> int:
        """Nodes needed to continue a run that has started."""
        return self.min_nodes if ".." in str(self.nodes) else 1
