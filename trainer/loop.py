"""The training loop: step, record, evaluate, save, until the last step or until told to leave."""

import logging
import math
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from types import FrameType

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray

from manta.data.samples import Samples
from manta.trainer.checkpoint import store
from manta.trainer.checkpoint.state import logical_state, optimizer_steps
from manta.trainer.config import TrainingConfig
from manta.trainer.engine import Engine, Microbatch
from manta.trainer.heartbeat import Heartbeat
from manta.trainer.metrics import Line, MetricsLog, describe
from manta.trainer.rundir import RunDirectory
from manta.trainer.schedule import learning_rate
from manta.trainer.world import World

log = logging.getLogger(__name__)
DIGEST_BITS = 32  # sums of so many bits over 2**20 samples are still exact in a float64


class Notice:
    """Remembers that somebody asked us to leave. Acted on between steps, on all ranks together."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)

    def _take(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


class Loop:
    """One rank's part in training. All ranks do the same things in the same order."""

    def __init__(
        self,
        *,
        config: TrainingConfig,
        world: World,
        samples: Samples,
        engine: Engine,
        home: RunDirectory,
        heartbeat: Heartbeat,
        notice: Notice,
        peak: float | None,
        flops_per_token: float,
        identity: dict[str, str],
    ) -> None:
        self.config, self.world, self.samples, self.engine, self.home = config, world, samples, engine, home
        self.heartbeat, self.notice, self.peak, self.flops_per_token, self.identity = heartbeat, notice, peak, flops_per_token, identity
        self.saved: int | None = None  # the step of the newest checkpoint
        self._digest = 0
        self._waited = 0.0

    def run(self, step: int) -> int:
        """From `step` steps done to the last. Gives the steps done: fewer than all where we were told to leave."""
        metrics = MetricsLog(self.home.metrics_file) if self.world.rank == 0 else None
        last = self.config.train.steps
        self.saved = step or None
        leave = False
        while step < last and not leave:
            line, leave = self._step(step)
            step += 1
            self.heartbeat("step", step)
            if step == last or (step % self.config.evaluate.every_steps == 0 and not leave):
                line["eval/loss"] = self.evaluate(step)
            due = step % self.config.track.every_steps == 0 or "eval/loss" in line
            if metrics and due:
                metrics.write(line)
                log.info("step %d/%d  %s", step, last, describe(line))
            if step % self.config.checkpoint.every_steps == 0:
                self.save(step)
        if step != self.saved:
            self.save(step)
        if metrics:
            metrics.close()
        self.heartbeat("done", step)
        return step

    def _step(self, step: int) -> tuple[Line, bool]:
        """One optimizer step; the line that tells of it, and whether any rank was told to leave."""
        start = time.perf_counter()
        rate = learning_rate(self.config.schedule, peak=self.config.optimizer.learning_rate, step=step, steps=self.config.train.steps)
        self._digest, self._waited = 0, 0.0
        loss, norm = self.engine.step(self._microbatches(step), learning_rate=rate)
        loss, asked, digest = self._total(float(loss), float(self.notice.signal is not None), float(self._digest))
        loss /= self.world.size
        seconds = time.perf_counter() - start
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {step + 1}: loss {loss}, gradient norm {norm}; lower optimizer.learning_rate or lengthen the warmup"
            )
        tokens = self.config.train.global_batch * self.config.data.sequence_length
        speed = tokens / seconds
        peak = self.peak and self.peak * self.world.size
        line: Line = {
            "step": step + 1,
            "tokens": (step + 1) * tokens,
            "time": time.time(),
            "train/loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_second": round(speed, 1),
            "mfu": peak and round(speed * self.flops_per_token / peak, 4),
            "data_wait": round(self._waited, 6),
            "step_time": round(seconds, 6),
            "memory/peak": self._peak_memory(),
            "data/digest": int(digest) % 2**DIGEST_BITS,
            "world_size": self.world.size,
            "attempt": self.world.attempt,
        }
        return line, asked > 0

    def _microbatches(self, step: int) -> Iterator[Microbatch]:
        for turn in range(self.engine.layout.accumulation):
            self.heartbeat("step", step)
            start = time.perf_counter()
            numbers = self.engine.layout.samples(step=step, turn=turn, rank=self.world.rank)
            windows = self.samples.train(numbers)
            # Summed over ranks, in any order: two runs that read the same samples show the same digest, on any machines.
            self._digest += sum(xxhash.xxh3_64_intdigest(window.tobytes()) % 2**DIGEST_BITS for window in windows)
            batch = self._microbatch(windows)
            self._waited += time.perf_counter() - start
            yield batch

    def evaluate(self, step: int) -> float:
        """Mean loss in nats a token over the first `evaluate.samples` validation sequences, dealt over the ranks."""
        self.heartbeat("evaluate", step)
        indices = np.arange(validation_samples(self.config, self.samples))[self.world.rank :: self.world.size]
        total = torch.zeros((), dtype=torch.float64)
        for first in range(0, len(indices), self.config.train.micro_batch):
            self.heartbeat("evaluate", step)
            chunk = indices[first : first + self.config.train.micro_batch]
            total += float(self.engine.loss(self._microbatch(self.samples.validation(chunk)))) * len(chunk)
        loss, count = self._total(float(total), float(len(indices)))
        return loss / count

    def save(self, step: int) -> None:
        self.heartbeat("save", step)
        state = logical_state(self.engine)
        progress = store.Progress(
            step=step, samples_consumed=step * self.config.train.global_batch, optimizer_steps=optimizer_steps(self.engine)
        )
        keep = self.config.checkpoint.keep
        path = store.save(self.home.checkpoints, state, progress, identity=self.identity, attempt=self.world.attempt, keep=keep)
        self.saved = step
        log.info("saved %s", path)

    def _microbatch(self, windows: NDArray[np.int64]) -> Microbatch:
        """Windows [B, T + 1] -> tokens and targets [B, T] on the device."""
        both = torch.from_numpy(windows)
        if self.world.device.type == "cuda":
            both = both.pin_memory().to(self.world.device, non_blocking=True)
        return Microbatch(tokens=both[:, :-1], targets=both[:, 1:])

    def _total(self, *values: float) -> Sequence[float]:
        """Each value summed over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.world.device)
        dist.all_reduce(total)
        return total.tolist()

    def _peak_memory(self) -> int:
        """Bytes: of the GPU where there is one, else of this process."""
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.world.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def validation_samples(config: TrainingConfig, samples: Samples) -> int:
    """How many of the validation windows are evaluated."""
    return min(config.evaluate.samples, samples.validation_windows)
