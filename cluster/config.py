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
    """Nodes to run on. `4` starts on 4 and continues on fewer if some are lost. `2..8` starts on 2 to 8, and waits while fewer than 2 are
    available. In both cases the run grows when nodes join. On one machine, 2 or more simulate a cluster."""
    ranks_per_node: int | None = Field(default=None, ge=1)
    """Ranks on each node. Unset: one per GPU; without a GPU two, or one on a single core."""
    start_timeout: float = Field(default=600.0, gt=0)
    """Seconds to wait for nodes. Also how long a rank may send no heartbeat before its first step, while compiling and while saving."""
    step_timeout: float | None = Field(default=None, gt=0, examples=[300.0])
    """Seconds a rank may send no heartbeat while it steps; then the attempt counts as hung. Unset: learned (docs/recovery.md)."""
    node_timeout: float = Field(default=30.0, gt=0)
    """Seconds a node may leave the controller without an answer; then it counts as lost, and the run continues without it."""
    grace_period: float = Field(default=60.0, ge=0)
    """Seconds the ranks have to save and exit after a stop request."""
    stop_after: Annotated[str, AfterValidator(_duration)] | None = Field(default=None, examples=["3:50:00"])
    """Save and exit with 75 after this manta has run for this long: for a job whose time limit is not announced by a signal."""
    max_restarts_without_progress: int = Field(default=3, ge=0)
    """Consecutive restarts that get no further than an earlier attempt before the run gives up."""
    hot_standby: bool = True
    """Keep standby processes with everything imported, so that a restart takes tenths of a second. Costs their memory."""
    keep_logs: int = Field(default=20, ge=1)
    """Newest attempts whose logs are kept; older ones are deleted as an attempt starts. Nothing else limits a rank's log, which gets a
    line per logged step. It is only appended to, so logrotate (copytruncate) may truncate it."""
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
