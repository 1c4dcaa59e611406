"""Where a run's checkpoints lie: a directory, or a URL of an object store. Both promise that a checkpoint is there whole, or not at all.

On a disk it is written beside its place, synced, and renamed into it. An object store can not rename; there the manifest, put last, is what
makes objects a checkpoint. Neither lets a dead attempt commit: each attempt leaves its token in `fence`, and who comes to commit and finds
another's is refused. A rank that was frozen between that look and the rename finds its files swept away: whoever sets a fence does that
before it looks for checkpoints.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Protocol

from manta.data.errors import InputError
from manta.trainer.checkpoint.manifest import step_of

log = logging.getLogger(__name__)
LATEST, BAD = "latest", "bad-"

Body = Callable[[], Iterator[memoryview]]
"""A file's bytes, in order; asked for again where a store has to be tried again."""


class Storage(Protocol):
    """Checkpoints go by name, step-00000100. A writer's `token` tells its files from those of other attempts."""

    def names(self) -> list[str]:
        """Of all that are committed, newest first. None of them has been looked into."""
        ...

    def bad(self) -> list[str]:
        """Of those that were set aside."""
        ...

    def at(self, name: str) -> str: ...

    def manifest(self, name: str) -> bytes: ...

    def size(self, name: str, file: str) -> int: ...

    def reader(self, name: str, file: str) -> "Reader":
        """Of a committed checkpoint's file. Raises OSError where there is none."""
        ...

    def fence(self, attempt: int, token: str) -> None:
        """From here on none but this token's holder commits. Raises FencedError where a later attempt has been here.

        attempt: 0 is a run that nobody supervises: it has the run's lock, and comes after whoever was here.
        """
        ...

    def write(self, name: str, token: str, file: str, body: Body) -> str:
        """A file of a checkpoint to be, durable once this returns. Gives its name within the checkpoint."""
        ...

    def free(self) -> int | None:
        """Bytes that there is room for; None where nobody knows."""
        ...

    def commit(self, name: str, token: str, manifest: bytes) -> None:
        """Raises FencedError where another attempt has begun."""
        ...

    def abandon(self, name: str, token: str) -> None:
        """Takes back what was written and not committed."""
        ...

    def delete(self, name: str) -> None:
        """A committed one, or one that was set aside."""
        ...

    def set_aside(self, name: str) -> None:
        """Takes a bad one out of sight; its bytes stay for whoever wants to look."""
        ...

    def holds(self, token: str) -> bool:
        """Whether nobody else has begun since."""
        ...


class Reader(Protocol):
    def read_into(self, start: int, buffer: memoryview) -> int:
        """Fills the buffer from byte `start`. Gives how many bytes there were; fewer than asked where the file ends."""
        ...

    def close(self) -> None: ...


def newest_first(names: Iterator[str]) -> list[str]:
    """Those that are checkpoints' names, by step."""
    steps = {name: step for name in names if (step := step_of(name)) is not None}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def tell_latest(at: object, name: str, tell: Callable[[], None]) -> None:
    """For people: nothing relies on it, so a failure here does not undo the commit before."""
    try:
        tell()
    except (OSError, InputError) as error:
        log.warning("%s: %s; %s is saved all the same", at, getattr(error, "strerror", None) or error, name)
