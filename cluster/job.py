"""What is to be run: any Python program, as so many ranks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`program` is what each node's own Python is called with; `environment` is laid over the agent's own; `directory`, which every node
    sees, is where the ranks run, and where journal and logs go.
    """

    program: tuple[str, ...]
    environment: dict[str, str]
    directory: Path
    sizes: tuple[int, ...]
    """Numbers of ranks it can run as."""
    fewer: tuple[int, ...] = ()
    """Numbers of ranks it can go on as where too many are lost for any of those."""
    environment_by_ranks: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    """Variables that each rank gets in addition, for a number of ranks: what a run computes once per layout."""
    ranks_per_node: int | None = None
    """None: as many as a node has GPUs."""
    packages: tuple[tuple[str, str], ...] = ()
    """Names and versions of what a node should have. The first has to be the same; where others differ, that is told."""

    @property
    def seal(self) -> Path:
        """A word of the controller's: a node that reads another one there has another directory."""
        return self.directory / "seal"
