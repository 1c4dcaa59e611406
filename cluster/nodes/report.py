"""What a node's agent reports to the controller."""

from dataclasses import dataclass
from typing import Literal, TypedDict

from manta.cluster.protocol import RankError, RankPhase


class NodeFacts(TypedDict):
    """A plain dict, which any version of manta can read. `versions`: of the requested packages, None if not installed.

    `directory_token`: see Job; "" if the node does not see it.
    """

    host: str
    address: str
    versions: dict[str, str | None]
    directory_token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """The state of one rank. `phase`, `step`, `resumed_from`, `work`, `unwritten` and `disk_error` are those of its last heartbeat;
    `silent_seconds`: since then.

    `code`: exit code; None while it runs, negative if a signal ended it. `intervals`: how many intervals between two heartbeats in phase
    "step" were measured; `longest`: the longest of them, in seconds.
    """

    rank: int
    pid: int
    step: int
    phase: RankPhase | Literal[""]
    silent_seconds: float
    has_stepped: bool
    resumed_from: int | None = None
    state: str = ""
    code: int | None = None
    exited_at: float = 0.0
    error: RankError | None = None
    tail: str = ""
    work: float = 0.0
    intervals: int = 0
    longest: float = 0.0
    unwritten: int = 0
    disk_error: int = 0
