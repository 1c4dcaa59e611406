"""When a run is saved, and what a failed save means."""

import logging
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from manta.trainer.checkpoint.engine_state import engine_progress, logical_state
from manta.trainer.checkpoint.errors import SaveError
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.config.training import TrainingConfig
from manta.trainer.dataloader.loader import DataLoader
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.metrics import Line

log = logging.getLogger(__name__)
POLL = 1.0  # seconds between checks for a request


class SavePolicy:
    """All ranks call `save` and `finish` together, and `has_failed` and `is_due` independently."""

    def __init__(
        self,
        writer: CheckpointWriter,
        engine: Engine,
        loader: DataLoader,
        config: TrainingConfig,
        request_file: Path,
        *,
        step: int,
        window: Collection[tuple[float, float]],
    ) -> None:
        """step: where the run starts or resumes. window: the guard's; it changes with each step."""
        self._window = window
        self._writer, self._engine, self._loader, self._config, self._request_file = writer, engine, loader, config, request_file
        self._timeline = config.timeline()
        self.saved: int | None = step or None  # step of the newest checkpoint, or of the save in progress
        self.failures = 0  # in a row
        self._last_save = self._last_poll = time.monotonic()
        self._is_requested = False  # by the user

    def has_failed(self) -> bool:
        """Whether the save in progress has failed, as far as this rank knows."""
        if self._writer.outcome == "saved":
            self.finish()
        return self._writer.outcome == "failed"

    def is_due(self) -> bool:
        """Whether to save by the clock or at the user's request, which rank 0 decides. Saves every N steps are not considered."""
        if dist.get_rank() > 0:
            return False
        now, minutes = time.monotonic(), self._config.checkpoint.every_minutes
        if minutes is not None and now - self._last_save >= minutes * 60:
            return True
        if self._is_requested or now - self._last_poll < POLL:
            return False
        self._last_poll = now
        with suppress(OSError):  # a shared disk is unreachable for a moment
            self._is_requested = self._request_file.is_file()
        return self._is_requested

    def save(self, step: int, line: Line, *, wait: bool) -> None:
        """line: the step's metrics. wait: until it is committed; then a failure is raised, even if failures are tolerated.

        Raises ReplicaError if replicas of weights differ: corrupt weights are not saved.
        """
        self.finish()
        if self._config.guard.replica_check_every_steps:
            self._engine.replica_check.run(step)
        about: dict[str, Any] = {"layout": str(self._engine.layout), "ranks": dist.get_world_size()}
        about |= {"validation_loss": line.get("eval/loss"), "config": self._config.model_dump(mode="json")}
        self._last_save = time.monotonic()
        try:
            samples, cursors = self._timeline.first_sample(step), self._cursors(step)
            progress = engine_progress(self._engine, step=step, samples_consumed=samples, cursors=cursors, window=self._window)
            self._writer.save(logical_state(self._engine), progress, about=about, wait=wait)
        except SaveError as error:
            self._tolerate(error, wait=wait)
        else:
            self.saved = step
            if not self._writer.is_busy:
                self._succeed()

    def end(self, step: int, line: Line) -> None:
        """Save the last step unless already done, whether or not the save before it failed."""
        with suppress(SaveError):  # it was logged
            self.finish()
        if step != self.saved:
            self.save(step, line, wait=True)

    def finish(self) -> None:
        """Wait for the save in progress. Raises SaveError if it failed, and more have failed in a row than are tolerated."""
        was_busy = self._writer.is_busy
        try:
            self._writer.finish()
        except SaveError as error:
            self._tolerate(error, wait=False)
        else:
            if was_busy:
                self._succeed()

    def _tolerate(self, error: SaveError, *, wait: bool) -> None:
        self.failures, self.saved = self.failures + 1, None
        self._clear_request()
        tolerated = self._config.checkpoint.max_failed_saves
        if wait or self.failures > tolerated:
            log.error("could not save: %s", error)
            raise error
        log.error("could not save; training continues (%d of %d tolerated failures in a row): %s", self.failures, tolerated, error)

    def _succeed(self) -> None:
        self.failures = 0
        self._clear_request()

    def _clear_request(self) -> None:
        if dist.get_rank() == 0:
            with suppress(OSError):  # it is no file, and so no request; or the disk is read-only
                self._request_file.unlink(missing_ok=True)
        self._is_requested = False

    def _cursors(self, step: int) -> list[dict[str, int]] | None:
        """Return each data rank's position at the next step, or None if samples are read by number, by any rank."""
        cursor = self._loader.cursor(step)
        if cursor is None:
            return None
        cursors: list[tuple[int, dict[str, int]]] = [(self._engine.mesh.data_rank, asdict(cursor))] * dist.get_world_size()
        dist.all_gather_object(cursors, cursors[0])
        by_rank = dict(cursors)  # ranks that share samples have the same position
        return [by_rank[rank] for rank in range(self._engine.layout.data)]
