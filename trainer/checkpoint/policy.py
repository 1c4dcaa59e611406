"""When a run is saved, and what becomes of a save that fails."""

import logging
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from manta.trainer.checkpoint.engine_state import logical_state, progress
from manta.trainer.checkpoint.errors import SaveError
from manta.trainer.checkpoint.manifest import Progress
from manta.trainer.checkpoint.writer import Saver
from manta.trainer.config.training import TrainingConfig
from manta.trainer.dataloader.loader import DataLoader
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.metrics import Line
from manta.trainer.run_directory import RunDirectory

log = logging.getLogger(__name__)
LOOK = 1.0  # seconds between two looks for a request


class Saves:
    """All ranks call `save` and `finish` together; `look` each by itself."""

    def __init__(self, saver: Saver, engine: Engine, reader: DataLoader, config: TrainingConfig, home: RunDirectory, *, step: int) -> None:
        """step: at which the run goes on."""
        self._saver, self._engine, self._reader, self._config, self._home = saver, engine, reader, config, home
        self._timeline = config.timeline()
        self.saved: int | None = step or None  # the step of the newest checkpoint, or of the one under way
        self.failures = 0  # in a row
        self._at = self._looked = time.monotonic()
        self._is_answering = False  # a person who asked for a checkpoint

    def look(self) -> tuple[bool, bool]:
        """Whether this rank knows of a reason to save, step count apart; and whether it knows that the save under way has failed."""
        if self._saver.is_busy and self._saver.is_done and not self._saver.has_failed:
            self.finish()
        return dist.get_rank() == 0 and self._is_asked(), self._saver.has_failed

    def _is_asked(self) -> bool:
        """By the clock, or by a person."""
        now, minutes = time.monotonic(), self._config.checkpoint.every_minutes
        if minutes is not None and now - self._at >= minutes * 60:
            return True
        if self._is_answering or now - self._looked < LOOK:
            return False
        self._looked = now
        self._is_answering = self._home.request_file.exists()
        return self._is_answering

    def save(self, step: int, line: Line, *, wait: bool) -> None:
        """line: what was measured of this step. wait: until it is there; a failure is then raised, however many are tolerated.

        Raises ReplicaError where weights have changed by themselves: they are not saved.
        """
        self.finish()
        if self._config.guard.replica_check_every_steps:
            self._engine.replicas.look(step)
        told: dict[str, Any] = {
            "layout": str(self._engine.layout),
            "ranks": dist.get_world_size(),
            "validation_loss": line.get("eval/loss"),
            "config": self._config.model_dump(mode="json"),
        }
        self._at = time.monotonic()
        try:
            self._saver.save(logical_state(self._engine), self._progress(step), about=told, wait=wait)
        except SaveError as error:
            self._tolerate(error, wait=wait)
        else:
            self.saved = step
            if not self._saver.is_busy:
                self._settle()

    def end(self, step: int, line: Line) -> None:
        """The last save, where it is not made yet, whatever became of the one before."""
        with suppress(SaveError):  # told in the log
            self.finish()
        if step != self.saved:
            self.save(step, line, wait=True)

    def finish(self) -> None:
        """Waits for the save under way. Raises SaveError where it failed, and as many before it as are tolerated."""
        busy = self._saver.is_busy
        try:
            self._saver.finish()
        except SaveError as error:
            self._tolerate(error, wait=False)
        else:
            if busy:
                self._settle()

    def _tolerate(self, error: SaveError, *, wait: bool) -> None:
        self.failures, self.saved = self.failures + 1, None
        self._answer()
        tolerated = self._config.checkpoint.max_failed_saves
        if wait or self.failures > tolerated:
            log.error("could not save: %s", error)
            raise error
        log.error("could not save, and train on (%d of %d such failures in a row are tolerated): %s", self.failures, tolerated, error)

    def _settle(self) -> None:
        self.failures = 0
        self._answer()

    def _answer(self) -> None:
        if dist.get_rank() == 0:
            self._home.request_file.unlink(missing_ok=True)
        self._is_answering = False

    def _progress(self, step: int) -> Progress:
        return progress(self._engine, step=step, samples_consumed=self._timeline.first_sample(step), cursors=self._cursors(step))

    def _cursors(self, step: int) -> list[dict[str, int]] | None:
        """Where each data rank's reading of the next step begins; None where samples are had by number, by whichever rank."""
        cursor = self._reader.cursor(step)
        if cursor is None:
            return None
        told: list[tuple[int, dict[str, int]]] = [(self._engine.mesh.data_rank, asdict(cursor))] * dist.get_world_size()
        dist.all_gather_object(told, told[0])
        by_rank = dict(told)  # ranks that share samples stand at the same place
        return [by_rank[rank] for rank in range(self._engine.layout.data)]
