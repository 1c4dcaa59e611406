"""How much machinery a run gets and how patient it is: the `cluster` section."""

import math
import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from manta.cluster.target_config import Kubernetes, Slurm, Ssh

_DURATION = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
_RANGE = re.compile(r"([1-9]\d*)(?:\.\.([1-9]\d*))?")


def _is_range(nodes: int | str) -> int | str:
    """Raises ValueError where it is no number of nodes, nor a range of them."""
    found = _RANGE.fullmatch(str(nodes))
    if found is None or int(found[1]) > int(found[2] or found[1]):
        raise ValueError("wants a number of nodes, as 4, or a range, as 2..8")
    return nodes


def _is_duration(text: str) -> str:
    if _DURATION.fullmatch(text) is None:
        raise ValueError("wants a time as hours:minutes:seconds, as 3:50:00, or days-hours:minutes:seconds")
    return text


class ClusterConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    nodes: Annotated[int | str, AfterValidator(_is_range)] = 1
    """Nodes to run on. `4` begins on 4, and where some are lost goes on with those that are left; `2..8` begins on as many as there are,
    and waits where fewer than 2 are left. Either takes in nodes that come (back). On one machine, 2 or more are a rehearsal."""
    ranks_per_node: int | None = Field(default=None, ge=1)
    """Ranks on each node. Unset: one a GPU; without a GPU two, or one on a single core."""
    start_timeout: float = Field(default=600.0, gt=0)
    """Seconds to wait for nodes; and that a rank may go without a sign of life before its first step (imports, loading a checkpoint), or as
    it compiles or saves."""
    step_timeout: float | None = Field(default=None, gt=0, examples=[300.0])
    """Seconds a rank may go without a sign of life once it steps; then the attempt counts as hung. Unset: learned (docs/recovery.md)."""
    node_timeout: float = Field(default=30.0, gt=0)
    """Seconds a node may leave its controller without an answer; then it counts as lost, and the run goes on without it."""
    grace_period: float = Field(default=60.0, ge=0)
    """Seconds the ranks have to save and exit after a stop request."""
    stop_after: Annotated[str, AfterValidator(_is_duration)] | None = Field(default=None, examples=["3:50:00"])
    """Save and leave, with 75, once this manta has run for so long: where a job's time is limited and nobody says when it is up."""
    max_restarts_without_progress: int = Field(default=3, ge=0)
    """Consecutive restarts that get no further than an earlier attempt before the run gives up."""
    hot_standby: bool = True
    """Keep standby processes with everything imported, so that a restart takes tenths of a second. Costs their memory."""
    keep_logs: int = Field(default=20, ge=1)
    """Attempts whose logs are kept, the newest; older ones are deleted as an attempt starts. Nothing else bounds a rank's log, which
    gets a line a logged step; it is only added to, so that logrotate (copytruncate) may cut it."""
    ssh: Ssh = Ssh()
    """How `manta train --on ssh:FILE` reaches its hosts."""
    slurm: Slurm = Slurm()
    """What `manta train --on slurm` asks for there."""
    kubernetes: Kubernetes = Kubernetes()
    """What `manta train --on kubernetes` makes there."""

    @property
    def distrust(self) -> float:
        """Seconds that a lost node is left out though Ray believes in it, which asks after it each second."""
        return max(60.0, 10 * self.node_timeout)

    @property
    def seconds(self) -> float:
        """Of stop_after; without end where it is unset."""
        if self.stop_after is None:
            return math.inf
        found = _DURATION.fullmatch(self.stop_after)
        assert found is not None
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def least(self) -> int:
        """Nodes without which the run does not begin."""
        return int(str(self.nodes).split("..", maxsplit=1)[0])

    @property
    def most(self) -> int:
        return int(str(self.nodes).rsplit("..", maxsplit=1)[-1])

    @property
    def least_left(self) -> int:
        """Nodes without which a run that has begun does not go on."""
        return self.least if ".." in str(self.nodes) else 1
