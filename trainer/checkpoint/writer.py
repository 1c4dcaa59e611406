"""Saves, on all ranks together: each writes its share, the first commits. Asynchronously, training goes on while shares are written.

One save is under way at most. What ranks tell each other of it goes over a group of its own, which training's collectives do not meet.
"""

import errno
import logging
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch import Tensor

from manta.data.errors import InputError
from manta.trainer.checkpoint.agreement import first_deals, first_hears, first_says, rank_of_ranks
from manta.trainer.checkpoint.backend import DISK_FULL, CheckpointBackend
from manta.trainer.checkpoint.catalog import validation_loss
from manta.trainer.checkpoint.errors import SaveError
from manta.trainer.checkpoint.manifest import Checkpoint, File, Progress, name_of, to_bytes
from manta.trainer.checkpoint.retention import Keep, surplus
from manta.trainer.checkpoint.shards import Pieces
from manta.trainer.checkpoint.write_plan import Plan, Share, held, plan

log = logging.getLogger(__name__)
SHUT = {errno.EROFS, errno.EACCES, errno.EPERM}
REFUSED = (OSError, InputError)  # what a disk or a store says


class Saver:
    """All ranks call each method together; a process that is no rank calls them alone."""

    def __init__(
        self, where: CheckpointBackend, *, identity: Mapping[str, str], attempt: int, keep: Keep | None = None, asynchronous: bool = False
    ) -> None:
        """keep: None deletes nothing."""
        self.where, self._identity, self._attempt, self._keep, self._asynchronous = where, dict(identity), attempt, keep, asynchronous
        self._rank, ranks = rank_of_ranks()
        self._group: Any = dist.new_group(backend="gloo") if ranks > 1 else None
        self._plan: Plan | None = None
        self._share: Share | None = None
        self._token = first_says(lambda: f"a{attempt:04d}-{secrets.token_hex(4)}", self._group)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def fence(self) -> None:
        """No earlier attempt commits from here on; called before a checkpoint is looked for. Raises FencedError in an earlier one.

        SaveError where a disk that is full, or may not be written, stands against it: to try again would be of no use.
        """
        first_says(self._fence, self._group)

    def save(self, state: Mapping[str, Pieces], progress: Progress, *, about: Mapping[str, Any] | None = None, wait: bool = True) -> None:
        """`state` has the same places and shapes at each call: who writes what is planned once.

        wait: until it is committed. Else `finish` waits, and raises what went wrong. Raises as `finish` does.
        """
        self.finish()
        begun = time.monotonic()
        if self._share is None:
            self._plan, places = self._planned(state)
            self._share = Share(places, state)
        told = {"attempt": self._attempt, "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **(about or {})}
        if wait or not self._asynchronous:
            self._write(progress, told, self._share.views(state), begun)
            self.finish()
            return
        views = self._share.stage(state)
        log.info("step %d: copied in %.3f s; it is written while training goes on", progress.step, time.monotonic() - begun)
        self._thread = threading.Thread(target=self._write, args=(progress, told, views, begun), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way whose end nobody has waited for."""
        return self._thread is not None

    @property
    def is_done(self) -> bool:
        """Whether the save under way has ended: `finish` would not wait."""
        return self._thread is None or not self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether the save under way has ended badly, as far as this rank knows: `finish` raises it."""
        return self._failure is not None

    def finish(self) -> None:
        """Waits for the save under way. Raises on every rank where it failed on any: SaveError, or FencedError."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _fence(self) -> None:
        try:
            self.where.set_fence(self._attempt, self._token)
        except OSError as error:
            if error.errno not in DISK_FULL | SHUT:
                raise
            raise SaveError(f"an attempt has to be noted before it goes on: {self._told('', error)}") from None

    def _planned(self, state: Mapping[str, Pieces]) -> tuple[Plan | None, Any]:
        told = first_hears(held(state), self._group)
        made = plan(told) if self._rank == 0 else None
        return made, first_deals(made.shares if made else [], self._group)

    def _write(self, progress: Progress, about: Mapping[str, Any], views: Sequence[Tensor], begun: float) -> None:
        """This rank's share; then, on the first, the commit. It ends alike on every rank, unless one is gone."""
        name = name_of(progress.step)
        try:
            told = first_hears(self._written(name, views), self._group)
            first_says(lambda: self._commit(name, told, progress, about), self._group)
            log.info("saved %s in %.3f s", self.where.location(name), time.monotonic() - begun)
        except Exception as error:  # noqa: BLE001  `finish` raises it
            self._failure = error

    def _written(self, name: str, views: Sequence[Tensor]) -> File | Exception | None:
        assert self._share is not None
        share, hashes = self._share, list[str]()
        if not share.places:
            return None
        file, free = f"rank-{self._rank:04d}.safetensors", None
        try:
            free = self.where.store.free_bytes()
            file = self.where.write(name, self._token, file, lambda: share.body(views, hashes))
        except REFUSED as error:
            return SaveError(f"rank {self._rank}: {self._told(name, error, share.bytes, free)}")
        except Exception as error:  # told to the first rank, which waits for it: as one that can surely be sent
            log.exception("%s: rank %d could not write its share", self.where.location(name), self._rank)
            return RuntimeError(f"rank {self._rank}: {type(error).__name__}: {error}")
        return File(file, share.bytes, tuple(hashes))

    def _commit(self, name: str, told: list[File | Exception | None], progress: Progress, about: Mapping[str, Any]) -> None:
        assert self._plan is not None
        wanted = free = None
        try:
            for one in told:
                if isinstance(one, Exception):
                    raise one  # noqa: TRY301  cleared away as what goes wrong here
            files = {rank: one for rank, one in enumerate(told) if isinstance(one, File)}
            checkpoint = Checkpoint(
                at=self.where.location(name),
                progress=progress,
                identity=self._identity,
                files=tuple(files.values()),
                tensors=self._plan.tensors({rank: number for number, rank in enumerate(files)}),
                about=dict(about),
            )
            manifest = to_bytes(checkpoint)
            wanted, free = len(manifest), self.where.store.free_bytes()
            self.where.commit(name, self._token, manifest)
        except Exception as error:
            with suppress(*REFUSED):  # what is wrong already is told; the next attempt sweeps
                self.where.abandon(name, self._token)
            if isinstance(error, REFUSED):
                raise SaveError(self._told(name, error, wanted, free)) from None
            raise
        try:
            self._prune(name)
        except REFUSED as error:
            log.warning("%s: could not delete what is kept no more: %s", self.where.location(name), error)

    def _told(self, name: str, error: Exception, wanted: int | None = None, free: int | None = None) -> str:
        """What a disk or a store says, with what a person has to know of it. free: bytes, before anything was written."""
        if not isinstance(error, OSError) or error.strerror is None:
            return str(error)
        wants = "" if wanted is None else f": wants {wanted:,} bytes" + ("" if free is None else f", and {free:,} were free")
        remedy = "; make room, or lower checkpoint.keep" if error.errno in DISK_FULL else ""
        return f"{error.filename or self.where.location(name)}: {error.strerror}{wants}{remedy}"

    def _prune(self, newest: str) -> None:
        """Only the attempt that the run belongs to deletes, and never what it has just saved."""
        if self._keep is None:
            return
        for name in surplus(self.where.names(), newest, self._keep, lambda name: validation_loss(self.where, name)):
            if self.where.is_fence_held_by(self._token):
                self.where.delete(name)
