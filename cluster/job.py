"""What to run: a Python program, as a number of ranks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`program`: arguments of each node's Python interpreter. `environment` overrides the agent's own variables.

    `directory`: where the ranks run, and where event log and logs are written; all nodes share it.
    """

    program: tuple[str, ...]
    environment: dict[str, str]
    directory: Path
    sizes: tuple[int, ...]
    """Numbers of ranks that it can run as."""
    fallback_sizes: tuple[int, ...] = ()
    """Numbers of ranks that it can continue as if too few are left for any of those."""
    environment_by_size: Mapping[int, Mapping[str, str]] = field(default_factory=dict[int, Mapping[str, str]])
    """Additional variables of each rank, by the number of ranks."""
    ranks_per_node: int | None = None
    """None: one per GPU."""
    packages: tuple[tuple[str, str], ...] = ()
    """Names and versions that a node should have. A node with another version of the first is refused; other differences are reported."""
    files: Mapping[Path, bytes] = field(default_factory=dict[Path, bytes])
    """What ranks read when they start. A file that is deleted while the job runs is written again."""

    rank_events: Path | None = None
    """A file to which ranks append events, in the form of the event log. The controller copies them to it."""

    companion: tuple[str, ...] = ()
    """Arguments of the Python interpreter for one more process, beside the controller. It is no rank, and nothing depends on it."""

    @property
    def directory_token(self) -> Path:
        """A file with the controller's random token: a node that reads another token does not share the directory."""
        return self.directory / "directory-token"
