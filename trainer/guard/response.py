"""What happens at a spike: its text is found and recorded, and then training continues, goes back, or stops."""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from manta.cluster.line_file import LineFile
from manta.cluster.protocol import HeartbeatWriter
from manta.data.live.live_samples import LiveSamples
from manta.data.sampling.samples import Samples
from manta.trainer.checkpoint.agreement import on_first_rank
from manta.trainer.checkpoint.errors import SaveError
from manta.trainer.config.sections import GuardConfig
from manta.trainer.dataloader.batch import Batch
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.engine.token_sums import SourceSums, TokenSums
from manta.trainer.guard.detection import Measured, SpikeDetector
from manta.trainer.guard.record import Action, Document, Kind, Ranges, SampleLoss, Spike, SpikeError, read_spikes

log = logging.getLogger(__name__)
MOST_SAMPLES, MOST_DOCUMENTS, MOST_PLACES = 4, 32, 4  # that are named; of each sample; and in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedStep:
    number: int
    """Counted from 1."""
    measured: Measured
    first: int
    """The read index of its first sample."""
    samples: int
    exhausted_scale: float | None = None
    """fp16: its gradients overflow at this loss scale, the smallest."""


class SpikeGuard:
    """All ranks call each method together."""

    def __init__(
        self,
        config: GuardConfig,
        samples: Samples | LiveSamples,
        engine: Engine,
        file: Path,
        heartbeat: HeartbeatWriter,
        *,
        attempt: int,
        window: Sequence[Sequence[float]] = (),
    ) -> None:
        """file: spikes.jsonl. window: of the checkpoint that the run resumes from."""
        self._config, self._samples, self._engine, self._file, self._attempt = config, samples, engine, file, attempt
        self._heartbeat = heartbeat
        self.detector = SpikeDetector(config, window)

    def rejects(self, loss: float, grad_norm: float) -> bool:
        """Whether a step's update is skipped: if a value is not finite, and at a spike unless spikes are only reported."""
        kind = self.detector.kind(Measured(loss, grad_norm))
        return kind == "not-finite" or (kind == "spike" and self._config.on_spike != "report")

    def end_step(self, step: FinishedStep, batches: Sequence[Batch]) -> None:
        """Act on a spike. batches: this rank's of the step.

        Raises SpikeError to go back, FloatingPointError to stop, and SaveError if the samples to exclude could not be recorded.
        """
        kind = self.detector.kind(step.measured)
        if kind is not None:
            self._heartbeat("evaluate", step.number - 1)  # to find its text may take longer than a step
            losses = self._sample_losses(batches, step.samples)
            action = on_first_rank(partial(self._record, kind, step, losses))
            if action == "rollback":
                raise SpikeError(f"{self._message(kind, step)}. Training goes back, and skips its samples.")
            if action == "stop":
                raise FloatingPointError(f"{self._message(kind, step)}. {self._remedy(kind, step)}")
        self.detector.add(step.measured)

    def _sample_losses(self, batches: Sequence[Batch], count: int) -> NDArray[np.float64]:
        """Return the mean loss of each sample of the step [count]; NaN if it has no targets, infinite if it is not finite."""
        layout, sums = self._engine.layout, TokenSums(count, self._samples.token_bytes)
        for micro_step, batch in enumerate(batches):
            slots = layout.samples_of_rank(first=0, micro_step=micro_step, rank=self._engine.mesh.data_rank)
            rows = np.repeat(slots, len(batch.tokens) // len(slots))
            self._engine.evaluate(replace(batch, sources=torch.from_numpy(rows)), sums)
        values = torch.from_numpy(sums.values).to(self._engine.device)
        dist.all_reduce(values)
        by_sample = SourceSums.of(values.flatten().tolist())
        losses = by_sample.mean_losses()
        return np.where(np.isnan(losses) & (by_sample.targets > 0), np.inf, losses)

    def _record(self, kind: Kind, step: FinishedStep, losses: NDArray[np.float64]) -> Action:
        """On rank 0: decide what to do, and write it down. Raises SaveError if it must be written, and cannot be."""
        numbers, limits = self._sample_numbers(step), self.detector.limits()
        samples, worst = ranges(numbers), self._worst(losses, numbers)
        spike = Spike(
            time=time.time(),
            event=kind,
            attempt=self._attempt,
            step=step.number,
            message=f"{self._message(kind, step)}{place_of(worst)}",
            action=self._action(kind, step, samples),
            loss=finite(step.measured.loss),
            grad_norm=finite(step.measured.grad_norm),
            loss_limit=finite(limits.loss),
            grad_norm_limit=finite(limits.grad_norm),
            samples=samples,
            worst=worst,
        )
        if problem := self._write(spike):
            if spike.action == "rollback":
                raise SaveError(f"the samples to skip could not be recorded: {problem}")
            log.error("a spike could not be recorded: %s", problem)
        return spike.action

    def _write(self, spike: Spike) -> str | None:
        """Append a spike to the file, durably. Returns what went wrong, if anything."""
        try:
            with closing(LineFile(self._file, sync=True)) as file:
                file.write(spike.model_dump_json().encode())
                return file.problem()
        except OSError as error:
            return f"{self._file}: {error.strerror or error}"

    def _action(self, kind: Kind, step: FinishedStep, samples: Ranges) -> Action:
        action: Action = self._config.on_spike
        if action == "report":
            return "stop" if kind == "not-finite" else "report"
        if action == "stop" or step.exhausted_scale is not None:
            return "stop"
        try:
            past = read_spikes(self._file)
        except OSError as error:
            raise SaveError(f"{self._file}: expected the run's spikes, got an error: {error.strerror}. Make it readable.") from None
        if any((spike.step, spike.samples, spike.action) == (step.number, samples, "rollback") for spike in past):
            return "stop"  # they are skipped already, and yet they were read: to go back again would not help
        near = {(spike.step, spike.samples) for spike in past if spike.action == action and self._is_near(spike.step, step.number)}
        return action if len(near | {(step.number, samples)}) <= self._config.max_spikes else "stop"

    def _is_near(self, one: int, other: int) -> bool:
        return abs(one - other) < self._config.spike_window

    def _worst(self, losses: NDArray[np.float64], numbers: NDArray[np.int64]) -> tuple[SampleLoss, ...]:
        """Return the samples with the highest losses and their documents, the highest first."""
        order = [int(slot) for slot in np.argsort(-losses, kind="stable") if not np.isnan(losses[slot])][:MOST_SAMPLES]
        return tuple(
            SampleLoss(sample=int(numbers[slot]), loss=finite(float(losses[slot])), documents=self._documents(int(numbers[slot])))
            for slot in order
        )

    def _documents(self, sample: int) -> tuple[Document, ...]:
        if isinstance(self._samples, LiveSamples):
            return ()
        try:
            found = self._samples.documents(sample)
        except Exception as error:  # noqa: BLE001  training does not depend on it
            log.warning("the documents of sample %d are unknown: %s: %s", sample, type(error).__name__, error)
            return ()
        return tuple(Document(**asdict(document)) for document in found[:MOST_DOCUMENTS])

    def _sample_numbers(self, step: FinishedStep) -> NDArray[np.int64]:
        indices = np.arange(step.first, step.first + step.samples)
        return indices if isinstance(self._samples, LiveSamples) else self._samples.sampler.sample_numbers(indices)

    def _message(self, kind: Kind, step: FinishedStep) -> str:
        measured, limits = step.measured, self.detector.limits()
        if step.exhausted_scale is not None:
            got = f"gradients that overflow fp16 at loss scale {step.exhausted_scale:g}, the smallest"
            return f"step {step.number}: expected finite numbers, got {got}"
        if kind == "not-finite":
            return f"step {step.number}: expected finite numbers, got loss {measured.loss} and gradient norm {measured.grad_norm}"
        above = [
            f"a {name} of at most {limit:.4g}, got {value:.4g}"
            for name, value, limit in zip(("loss", "gradient norm"), measured, limits, strict=True)
            if value > limit
        ]
        mean = f"mean and {self._config.spike_deviations:g} standard deviations of the last {len(self.detector.window)} steps"
        return f"step {step.number}: expected {' and '.join(above)} ({mean})"

    def _remedy(self, kind: Kind, step: FinishedStep) -> str:
        config, look = self._config, f"Look at the text in {self._file}"
        if step.exhausted_scale is not None:
            return "Use precision=bf16, or lower optimizer.learning_rate or lengthen the warmup, in a new run."
        if config.on_spike in {"skip", "rollback"}:
            more = f"These are more than guard.max_spikes ({config.max_spikes}) within {config.spike_window} steps"
            return f"{more}. {look}; raise guard.max_spikes, or lower optimizer.learning_rate in a new run."
        rollback = "" if isinstance(self._samples, LiveSamples) else "to continue without it, resume with guard.on_spike=rollback"
        if kind == "not-finite":
            return f"Lower optimizer.learning_rate or lengthen the warmup, in a new run{rollback and f'; {rollback}'}."
        return f"{look}{rollback and f'; {rollback}'}."


def place_of(worst: Sequence[SampleLoss]) -> str:
    """Name the sample with the highest loss and where its documents are, for a message."""
    if not worst:
        return ""
    places = [document.location for document in worst[0].documents if document.location]
    more = f" and {len(places) - MOST_PLACES} more" if len(places) > MOST_PLACES else ""
    return f"; sample {worst[0].sample} has the highest loss" + (f" ({', '.join(places[:MOST_PLACES])}{more})" if places else "")


def ranges(numbers: NDArray[np.int64]) -> Ranges:
    """Return ascending numbers as ranges [first, end)."""
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return tuple((int(part[0]), int(part[-1]) + 1) for part in parts)


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
