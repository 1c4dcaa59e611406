"""What all stores of checkpoints have in common: names, the fence between attempts, and the order in which a checkpoint is committed."""

import errno
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pydantic import TypeAdapter
from pydantic_core import from_json

from manta.data.errors import InputError, one_line
from manta.data.storage.store import Store
from manta.trainer.checkpoint.errors import CheckpointError, FencedError, UnreachableError, read_error
from manta.trainer.checkpoint.manifest import Count, Text, step_of_name

log = logging.getLogger(__name__)

FENCE, LATEST = "fence.json", "latest"
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class Fence(NamedTuple):
    """The attempt that may commit and delete checkpoints."""

    attempt: Count = 0
    token: Text = ""  # empty: any attempt may commit


_FENCE = TypeAdapter(Fence)
_MAX_FENCE = 10_000  # bytes


class CheckpointBackend(ABC):
    """Checkpoints by name, such as step-00000100. An attempt's token keeps its files apart from those of other attempts."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __str__(self) -> str:
        return self.store.location()

    def names(self) -> list[str]:
        """Return the names of all committed checkpoints, newest first. Their content is not checked.

        Raises UnreachableError if this user may not list them.
        """
        steps = {name: step for name in self._committed() if (step := step_of_name(name)) is not None}
        return sorted(steps, key=steps.__getitem__, reverse=True)

    def location(self, name: str) -> str:
        return self.store.location(name)

    def set_fence(self, attempt: int, token: str) -> None:
        """Let this token alone commit from now on, and sweep away what dead attempts left. Raises FencedError after a later attempt.

        attempt: 0 for an unsupervised run, which holds the run's lock and so follows all others.
        """
        fence = self._fence()
        if attempt and fence.attempt > attempt:
            raise FencedError(f"{self}: attempt {fence.attempt} has started since; this is attempt {attempt}, which can no longer save")
        content = json.dumps(Fence(max(attempt, fence.attempt), token)._asdict()).encode()
        self.store.create()
        try:
            self.store.write(FENCE, content)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self._sweep(token)  # which may free the space
            self.store.write(FENCE, content)
        self._sweep(token)

    def is_fence_held_by(self, token: str) -> bool:
        return self._fence().token in {token, ""}

    def write(self, name: str, token: str, file: str, parts: Callable[[], Iterable[memoryview]]) -> str:
        """Write a file of an uncommitted checkpoint, durable when this returns. Returns its path within the checkpoint."""
        self.store.write_parts(f"{self._uncommitted(name, token)}/{file}", parts)
        return file

    def commit(self, name: str, token: str, manifest: bytes) -> None:
        """Raises FencedError if another attempt has started."""
        self._publish(name, token, manifest)
        try:  # for users: nothing depends on it
            self.store.write(LATEST, f"{name}\n".encode())
        except (OSError, InputError) as error:
            reason = getattr(error, "strerror", None) or error
            log.warning("%s: %s; %s is saved nevertheless", self.location(LATEST), reason, name)

    @abstractmethod
    def bad(self) -> list[str]:
        """Return the names of the checkpoints that were set aside."""

    @abstractmethod
    def manifest(self, name: str) -> bytes:
        """Return the content of a checkpoint's manifest. Raises OSError, also if it is no regular file, or too large to be one."""

    @abstractmethod
    def check_readable(self, name: str) -> None:
        """Raises UnreachableError if this user may not read a checkpoint's files. Damage is found when they are loaded."""

    @abstractmethod
    def abandon(self, name: str, token: str) -> None:
        """Delete an uncommitted checkpoint."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a checkpoint that is committed or was set aside."""

    @abstractmethod
    def set_aside(self, name: str) -> None:
        """Hide a bad checkpoint. Its bytes are kept for inspection."""

    @abstractmethod
    def _committed(self) -> Iterable[str]: ...

    @abstractmethod
    def _uncommitted(self, name: str, token: str) -> str: ...

    @abstractmethod
    def _sweep(self, token: str) -> None:
        """Delete what dead attempts have half written, and finish what they have half done. token: of the attempt that sweeps."""

    @abstractmethod
    def _publish(self, name: str, token: str, manifest: bytes) -> None: ...

    def _fence(self) -> Fence:
        try:
            return _FENCE.validate_python(from_json(self.store.read(FENCE, _MAX_FENCE)))
        except FileNotFoundError:
            return Fence()
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and isinstance(unreachable := read_error(f"{self}/{FENCE}", error), UnreachableError):
                raise unreachable from None
            problem = getattr(error, "strerror", None) or one_line(error)[:200]
            raise CheckpointError(f"{self}/{FENCE}: damaged ({problem}). Delete it once no other attempt runs.") from None

    def _check_fence(self, name: str, token: str) -> None:
        if (fence := self._fence()).token not in {token, ""}:
            raise FencedError(f"{self.location(name)}: attempt {fence.attempt} has started since; this attempt can no longer save")
