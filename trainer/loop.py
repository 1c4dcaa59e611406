"""The training loop: step, log, evaluate and save, until the last step or a stop request."""

import json
import logging
import math
import resource
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from manta.cluster.line_file import LineFile
from manta.cluster.protocol import HeartbeatWriter
from manta.data.live.live_samples import LiveSamples
from manta.data.objectives.examples import DIGEST_BITS
from manta.data.sampling.samples import Samples
from manta.trainer.checkpoint.errors import SaveError
from manta.trainer.checkpoint.save_policy import SavePolicy
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.config.training import TrainingConfig
from manta.trainer.dataloader.batch import Batch
from manta.trainer.dataloader.loader import DataLoader
from manta.trainer.dist.world import World
from manta.trainer.energy import EnergyMeter, EnergyTotals
from manta.trainer.engine.deepspeed import Engine, UpdateResult
from manta.trainer.engine.token_sums import SourceSums, TokenSums
from manta.trainer.evaluation import Evaluation, by_name
from manta.trainer.guard.detection import Measured, is_comparable
from manta.trainer.guard.record import SpikeError
from manta.trainer.guard.response import FinishedStep, SpikeGuard
from manta.trainer.hardware import peak_flops
from manta.trainer.health import Health
from manta.trainer.metrics import Line, format_line
from manta.trainer.optim.schedules import learning_rate
from manta.trainer.run_directory import RunDirectory
from manta.trainer.signals import StopRequest

log = logging.getLogger(__name__)


class StepTotals(NamedTuple):
    """One step's values, reduced over all ranks. `terms`: of the loss. A flag is set if any rank sets it."""

    terms: Sequence[float]
    digest: int
    stop_requested: bool
    save_requested: bool
    save_failed: bool
    by_source: SourceSums | None
    energy: EnergyTotals


@dataclass
class Loop:
    """One rank's part in training. All ranks do the same things in the same order."""

    config: TrainingConfig
    world: World
    samples: Samples | LiveSamples
    engine: Engine
    run_dir: RunDirectory
    heartbeat: HeartbeatWriter
    stop: StopRequest
    flops_per_token: Mapping[int, float]  # by sequence length
    saver: CheckpointWriter
    guard: SpikeGuard
    metrics: LineFile | None  # rank 0 writes them
    validation_sets: Mapping[str, Samples] = field(default_factory=dict[str, Samples])

    def __post_init__(self) -> None:
        config, device = self.config, self.world.device
        self.dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
        self.peak_flops = peak_flops(device, self.dtype)
        self.timeline = config.timeline()
        reading = {"rank": self.engine.mesh.data_rank, "seed": config.run.seed, "steps": config.train.steps}
        self.loader = DataLoader(self.samples, self.timeline, self.engine.layout, **reading, device=device)
        self.evaluation = Evaluation(config, self.samples, self.engine, self.loader, self.world, self.heartbeat, self.validation_sets)
        self.energy = EnergyMeter.open(config.track, self.world, self.metrics.path if self.metrics else None)
        self._compiled_lengths = set[int]()  # blocks are compiled once for each sequence length

    def run(self, step: int) -> int:
        """Train on from `step` finished steps. Return the number of finished steps: fewer than train.steps after a stop request."""
        with closing(self.loader):
            return self._run(step)

    def _run(self, step: int) -> int:
        last = self.config.train.steps
        window, request = self.guard.detector.window, self.run_dir.save_request_file
        saves = SavePolicy(self.saver, self.engine, self.loader, self.config, request, step=step, window=window)
        stop, line = False, Line()
        while step < last and not stop:
            try:
                line, totals = self._step(step, saves)
            except SpikeError:  # on all ranks: go back no further than to the save in progress
                self.heartbeat("save", step)
                with suppress(SaveError):
                    saves.finish()
                raise
            stop = totals.stop_requested
            step += 1
            self.heartbeat("step", step)
            validation = self.evaluation.run(step, stop=stop)
            line |= validation
            every = (self.config.track.every_steps, self.config.track.health_every_steps)
            is_due = bool(validation) or any(is_multiple(step, one) for one in every)
            if self.metrics and is_due and math.isfinite(line["train/loss"]):
                self._log(self.metrics, line)
                log.info("step %d/%d  %s", step, last, format_line(line))
            if totals.save_failed:
                self.heartbeat("save", step)
                saves.finish()
            if totals.save_requested or step % self.config.checkpoint.every_steps == 0:
                self.heartbeat("save", step)
                saves.save(step, line, wait=False)
        self.heartbeat("save", step)
        saves.end(step, line)
        self.heartbeat("done", step)
        return step

    def _log(self, metrics: LineFile, line: Line) -> None:
        seconds = {phase: round(value, 4) for phase, value in self.heartbeat.seconds().items()}
        metrics.write(json.dumps(line | {"time": time.time(), "seconds": seconds}).encode())
        if metrics.error is not None and not self.heartbeat.unwritten:
            log.error("training continues, and lines wait in memory: %s", metrics.problem())
        self.heartbeat.unwritten, self.heartbeat.disk_error = metrics.unwritten, metrics.error.errno or 0 if metrics.error else 0

    def _step(self, step: int, saves: SavePolicy) -> tuple[Line, StepTotals]:
        """Do one optimizer step."""
        start = time.perf_counter()
        if not is_comparable(self.config, self.timeline, step):
            self.guard.detector.clear()
        rate = learning_rate(self.config.schedule, peak=self.config.optimizer.learning_rate, step=step, steps=self.config.train.steps)
        batches, digest, wait = self._read(step)
        by_source = len(self.samples.source_names) > 1 and is_multiple(step + 1, self.config.track.sources_every_steps)
        sums = self._token_sums() if by_source else None
        health = Health(self.engine) if is_multiple(step + 1, self.config.track.health_every_steps) else None
        health_start = time.perf_counter()
        if health:
            phase = self.heartbeat.phase
            self.heartbeat("evaluate", step)
            health.measure_activations(batches)
            self.heartbeat(phase, step)
        health_seconds = time.perf_counter() - health_start
        terms_K = self.engine.accumulate(batches, sums)
        if is_multiple(step + 1, self.config.guard.replica_check_every_steps):
            self.engine.replica_check.run(step + 1)
        totals = self._reduce(terms_K, digest, saves, sums)
        loss = self.engine.loss(totals.terms)
        with health.measure_update() if health else nullcontext():
            outcome = self.engine.update(terms_K, learning_rate=rate, rejects=partial(self.guard.rejects, loss))
        seconds = time.perf_counter() - start - health_seconds
        self.heartbeat.work = wait + self.engine.compute_timer.take_seconds()
        self._end_step(step, loss, outcome, batches)
        line = self._line(step, outcome, totals, learning_rate=rate, seconds=seconds, wait=wait)
        if health:
            line |= health.line(outcome.grad_norm, self.config.optimizer.gradient_clipping)
        if saves.failures:
            line["checkpoint/failures"] = saves.failures
        return line, totals

    def _end_step(self, step: int, loss: float, outcome: UpdateResult, batches: Sequence[Batch]) -> None:
        """Let the guard look at a step. Raises its errors."""
        # fp16 skips a step whose gradients overflow and retries with a smaller loss scale; nothing helps a loss that is not finite.
        if outcome.skipped and not outcome.exhausted and math.isfinite(loss):
            return
        finished = FinishedStep(
            number=step + 1,
            measured=Measured(loss, outcome.grad_norm),
            first=self.timeline.first_sample(step),
            samples=self.timeline.stage(step).global_batch,
            exhausted_scale=self.engine.loss_scale if outcome.exhausted else None,
        )
        self.guard.end_step(finished, batches)

    def _line(self, step: int, outcome: UpdateResult, totals: StepTotals, *, learning_rate: float, seconds: float, wait: float) -> Line:
        """Return a step's line of metrics.jsonl."""
        loss, stage = self.engine.loss(totals.terms), self.timeline.stage(step)
        speed = stage.global_batch * self.config.data.sequence_length / seconds
        line: Line = {
            "step": step + 1,
            "tokens": self.timeline.tokens(step + 1),
            "train/loss": loss,
            **{f"train/{name}": term for name, term in self.engine.named_terms(totals.terms).items()},
            **(by_name("train/loss", self.samples.source_names, totals.by_source.mean_losses()) if totals.by_source else {}),
            "global_batch": stage.global_batch,
            "sequence_length": stage.sequence_length,
            "learning_rate": learning_rate,
            "grad_norm": outcome.grad_norm if math.isfinite(outcome.grad_norm) and not outcome.skipped else None,
            "tokens_per_second": round(speed, 1),
            "mfu": self.utilization(speed * self.flops_per_token[stage.sequence_length] / self.world.size),
            "data_wait": round(wait, 6),
            "step_time": round(seconds, 6),
            "memory/peak": self._peak_memory(),
            "data/digest": totals.digest,
            "world_size": self.world.size,
            "layout": str(self.engine.layout),
            "attempt": self.world.attempt,
            **self.energy.line(totals.energy),
        }
        if self.engine.loss_scale is not None:
            line |= {"loss_scale": self.engine.loss_scale, "skipped": outcome.skipped}
        if outcome.rejected:
            line["rejected"] = True
        return line | {f"load/{name}": [round(share, 4) for share in load_E.tolist()] for name, load_E in self.engine.expert_loads.items()}

    def _read(self, step: int) -> tuple[list[Batch], int, float]:
        """Return all micro batches of a step, since each is weighted by what the whole step holds, their digest, and the seconds waited."""
        self.heartbeat("read", step)
        batches, digest, wait = list[Batch](), 0, 0.0
        for microbatch in self.loader.step(step):
            batches.append(microbatch.batch)
            digest += microbatch.digest
            wait += microbatch.wait_seconds
            self.heartbeat("read", step)
        length = self.timeline.stage(step).sequence_length
        self.heartbeat("step" if length in self._compiled_lengths else "compile", step)
        self._compiled_lengths.add(length)
        return batches, digest, wait

    def _reduce(self, terms_K: Tensor, digest: int, saves: SavePolicy, sums: TokenSums | None) -> StepTotals:
        failed, due = saves.has_failed(), saves.is_due()
        own_digest = digest if self.engine.mesh.is_first_of_sample else 0  # each sample's digest counts once
        energy = self.energy.take()
        stop, save, failed, total_digest, *values = self.world.sum(
            [self.stop.is_made, due, failed, own_digest, *energy, *terms_K.tolist(), *([] if sums is None else sums.values.flat)]
        )
        energy, values = EnergyTotals(*values[: len(energy)]), values[len(energy) :]
        terms, of_sources = values[: len(terms_K)], values[len(terms_K) :]
        return StepTotals(
            terms=[term / self.engine.layout.tensor for term in terms],  # each tensor rank has the same value
            digest=int(total_digest) % 2**DIGEST_BITS,
            stop_requested=stop > 0,
            save_requested=save > 0,
            save_failed=failed > 0,
            by_source=SourceSums.of(of_sources) if of_sources else None,
            energy=energy,
        )

    def _token_sums(self) -> TokenSums:
        return TokenSums(max(1, len(self.samples.source_names)), self.samples.token_bytes)

    def utilization(self, flops: float) -> float | None:
        """Return the share of a device's peak that a rank's `flops` per second are; None if the peak is unknown.

        A CPU's peak that training exceeds was measured while other programs ran: it is measured again.
        """
        if self.peak_flops and flops > self.peak_flops and self.world.device.type == "cpu":
            self.peak_flops = max(flops, peak_flops(self.world.device, self.dtype) or 0.0)
        return self.peak_flops and round(flops / self.peak_flops, 4)

    def _peak_memory(self) -> int:
        """Return the peak in bytes: of the GPU, or without one, of this process."""
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.world.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_multiple(step: int, every: int) -> bool:
    """Whether a step is a multiple of `every`; 0: never."""
    return bool(every) and step % every == 0
