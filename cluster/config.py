"""How much machinery a run gets and how patient it is: the `cluster` section."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ClusterConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    nodes: Literal[1] = 1
    """Machines to run on. Only 1 so far: this machine."""
    ranks_per_node: int | None = Field(default=None, ge=1)
    """Ranks on each machine. Unset: one a GPU; without a GPU two, or one on a single core."""
    start_timeout: float = Field(default=600.0, gt=0)
    """Seconds a rank may go without a sign of life before its first step (imports, loading a checkpoint), or as it compiles or saves."""
    step_timeout: float | None = Field(default=None, gt=0, examples=[300.0])
    """Seconds a rank may go without a sign of life once it steps; then the attempt counts as hung. Unset: learned (docs/recovery.md)."""
    grace: float = Field(default=60.0, ge=0)
    """Seconds the ranks have to save and leave when the run is told to stop."""
    restarts_without_progress: int = Field(default=3, ge=0)
    """Restarts in a row that get no further than an attempt before them until the run gives up."""
    keep_warm: bool = True
    """Keep spare processes ready (everything imported), so that a restart takes tenths of a second. Costs their memory."""
