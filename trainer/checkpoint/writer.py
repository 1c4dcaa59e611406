"""Saves by all ranks together: each writes its file, the first commits. An asynchronous save is written while training continues.

One save at most is in progress. Its ranks communicate over a separate process group, apart from training's collectives.
"""

import errno
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from manta.data.errors import InputError
from manta.trainer.checkpoint.agreement import gather_to_first, on_first_rank, rank_and_size, scatter_from_first
from manta.trainer.checkpoint.backend import DISK_FULL, CheckpointBackend
from manta.trainer.checkpoint.errors import CheckpointError, SaveError
from manta.trainer.checkpoint.manifest import About, Checkpoint, CheckpointFile, Progress, name_of_step, to_bytes
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.retention import Retention, delete_surplus
from manta.trainer.checkpoint.write_plan import RankFile, WritePlan, plan_writes, regions_of

log = logging.getLogger(__name__)
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
_STORAGE_ERRORS = (OSError, InputError)


class CheckpointWriter:
    """All ranks call each method together. A process without ranks calls them alone."""

    def __init__(
        self,
        backend: CheckpointBackend,
        *,
        identity: Mapping[str, str],
        attempt: int,
        retention: Retention | None = None,
        asynchronous: bool = False,
    ) -> None:
        """If retention is None, nothing is deleted."""
        self.backend, self._identity, self._attempt = backend, dict(identity), attempt
        self._retention, self._asynchronous = retention, asynchronous
        self._rank, size = rank_and_size()
        self._group: Any = dist.new_group(backend="gloo") if size > 1 else None
        self._plan: WritePlan | None = None
        self._file: RankFile | None = None
        self._token = on_first_rank(lambda: f"a{attempt:04d}-{secrets.token_hex(4)}", self._group)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def set_fence(self) -> None:
        """Stop earlier attempts from committing; call it before searching for a checkpoint. Raises FencedError in an earlier attempt.

        Raises SaveError if the disk is full or not writable: retrying would not help.
        """
        try:
            on_first_rank(partial(self.backend.set_fence, self._attempt, self._token), self._group)
        except OSError as error:
            if error.errno not in DISK_FULL | _NOT_WRITABLE:
                raise
            raise SaveError(f"the attempt could not be recorded: {self._message('', error)}") from None

    def save(
        self, state: Mapping[str, TensorViews], progress: Progress, *, about: Mapping[str, Any] | None = None, wait: bool = True
    ) -> None:
        """Save the state, which must have the same tensors and views in each call, because writes are planned once.

        wait: return once it is committed. Otherwise `finish` waits, and raises what went wrong. Raises the same errors as `finish`.
        """
        self.finish()
        start = time.monotonic()
        file = self._planned_file(state)
        about = {"attempt": self._attempt, "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **(about or {})}
        if wait or not self._asynchronous:
            self._write(file, file.views(state), progress, about, start)
            return
        views = file.stage(state)
        log.info("step %d: copied in %.3f s; it is written while training continues", progress.step, time.monotonic() - start)
        self._pending = self._thread.submit(self._write, file, views, progress, about, start)

    @property
    def is_busy(self) -> bool:
        """Whether a save was started that `finish` has not waited for."""
        return self._pending is not None

    @property
    def outcome(self) -> Literal["saved", "failed"] | None:
        """How the save in progress has ended, as far as this rank knows; None while it is written, and if there is none."""
        if self._pending is None or not self._pending.done():
            return None
        return "failed" if self._pending.exception() else "saved"

    def finish(self) -> None:
        """Wait for the save in progress. If it failed on any rank, raises SaveError or FencedError on every rank."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _planned_file(self, state: Mapping[str, TensorViews]) -> RankFile:
        if self._file is None:
            ranks = gather_to_first(regions_of(state), self._group)
            self._plan = plan_writes(ranks) if self._rank == 0 else None
            self._file = RankFile(scatter_from_first(self._plan.regions if self._plan else [], self._group), state)
        return self._file

    def _write(self, file: RankFile, views: Sequence[Tensor], progress: Progress, about: Mapping[str, Any], start: float) -> None:
        """Write this rank's file; then commit, on the first. Has the same outcome on every rank, unless one dies."""
        name = name_of_step(progress.step)
        files = gather_to_first(self._write_file(name, file, views), self._group)
        on_first_rank(lambda: self._complete(name, files, progress, about), self._group)
        log.info("saved %s in %.3f s", self.backend.location(name), time.monotonic() - start)

    def _write_file(self, name: str, file: RankFile, views: Sequence[Tensor]) -> CheckpointFile | Exception | None:
        """Return the file, None if this rank has none to write, or an error that can be sent to the first rank, which waits for it."""
        if not file.regions:
            return None
        hashes, free = list[str](), None
        try:
            free = self.backend.store.free_bytes()
            path = self.backend.write(name, self._token, f"rank-{self._rank:04d}.safetensors", lambda: file.parts(views, hashes))
        except _STORAGE_ERRORS as error:
            return SaveError(f"rank {self._rank}: {self._message(name, error, file.bytes, free)}")
        except Exception as error:
            log.exception("%s: rank %d could not write its file", self.backend.location(name), self._rank)
            return RuntimeError(f"rank {self._rank}: {type(error).__name__}: {error}")
        return CheckpointFile(path, file.bytes, tuple(hashes))

    def _complete(self, name: str, files: list[CheckpointFile | Exception | None], progress: Progress, about: Mapping[str, Any]) -> None:
        assert self._plan is not None
        needed = free = None
        try:
            for file in files:
                if isinstance(file, Exception):
                    raise file  # noqa: TRY301  abandoned like any other failure
            written = {rank: file for rank, file in enumerate(files) if isinstance(file, CheckpointFile)}
            checkpoint = Checkpoint(
                location=self.backend.location(name),
                progress=progress,
                identity=self._identity,
                files=tuple(written.values()),
                tensors=self._plan.stored_tensors({rank: index for index, rank in enumerate(written)}),
                about=About(**about),
            )
            manifest = to_bytes(checkpoint)
            needed, free = len(manifest), self.backend.store.free_bytes()
            self.backend.commit(name, self._token, manifest)
        except Exception as error:
            with suppress(*_STORAGE_ERRORS):  # the first error is reported; the next attempt sweeps
                self.backend.abandon(name, self._token)
            if isinstance(error, (*_STORAGE_ERRORS, CheckpointError)):  # the latter of a damaged fence
                raise SaveError(self._message(name, error, needed, free)) from None
            raise
        try:
            if self._retention is not None:
                delete_surplus(self.backend, name, self._retention, token=self._token)
        except (*_STORAGE_ERRORS, CheckpointError) as error:
            log.warning("%s: could not delete older checkpoints: %s", self.backend.location(name), error)

    def _message(self, name: str, error: Exception, needed: int | None = None, free: int | None = None) -> str:
        """Describe an error of the disk or store. needed, free: bytes, before anything was written."""
        if not isinstance(error, OSError) or error.strerror is None:
            return str(error)
        if error.errno == errno.EDQUOT:
            free = None  # the disk has room, but not for this user
        space = "" if needed is None else f": needs {needed:,} bytes" + ("" if free is None else f", and {free:,} were free")
        remedy = ". Free some space, or lower checkpoint.keep." if error.errno in DISK_FULL else ""
        return f"{error.filename or self.backend.location(name)}: {error.strerror}{space}{remedy}"
