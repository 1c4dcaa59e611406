"""What is to be run: any command, as so many ranks."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`environment` is laid over the agent's own; `directory` is where the ranks run, and where journal and logs go."""

    command: tuple[str, ...]
    environment: dict[str, str]
    directory: Path
    ranks: int
    ranks_per_node: int

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)

    def ranks_on(self, node: int) -> int:
        return min(self.ranks_per_node, self.ranks - node * self.ranks_per_node)
