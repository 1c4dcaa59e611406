"""The training loop: step, record, evaluate, save, until the last step or until told to leave."""

import logging
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from manta.cluster.protocol import HeartbeatWriter
from manta.data.live.live_samples import LiveSamples
from manta.data.objectives.examples import DIGEST_BITS
from manta.data.sampling.samples import Samples
from manta.trainer.checkpoint.policy import Saves
from manta.trainer.checkpoint.writer import Saver
from manta.trainer.config.training import TrainingConfig
from manta.trainer.dataloader.batch import Batch
from manta.trainer.dataloader.loader import DataLoader
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine, Outcome
from manta.trainer.metrics import Line, MetricsLog, format_line
from manta.trainer.optim.schedules import learning_rate
from manta.trainer.run_directory import RunDirectory
from manta.trainer.stop_request import Notice

log = logging.getLogger(__name__)


class Loop:
    """One rank's part in training. All ranks do the same things in the same order."""

    def __init__(
        self,
        *,
        config: TrainingConfig,
        world: World,
        samples: Samples | LiveSamples,
        engine: Engine,
        home: RunDirectory,
        heartbeat: HeartbeatWriter,
        notice: Notice,
        peak: float | None,
        flops_per_token: Mapping[int, float],
        saver: Saver,
    ) -> None:
        """flops_per_token: by sequence length."""
        self.config, self.world, self.samples, self.engine, self.home = config, world, samples, engine, home
        self.heartbeat, self.notice, self.peak, self.flops_per_token, self.saver = heartbeat, notice, peak, flops_per_token, saver
        self.timeline = config.timeline()
        reading = {"rank": engine.mesh.data_rank, "seed": config.run.seed, "steps": config.train.steps}
        self.reader = DataLoader(samples, self.timeline, engine.layout, **reading, device=world.device)
        self._digest = 0
        self._waited = 0.0
        self._lengths = set[int]()  # of sequences, that were trained on here

    def run(self, step: int) -> int:
        """From `step` steps done to the last. Gives the steps done: fewer than all where we were told to leave."""
        try:
            return self._run(step)
        finally:
            self.reader.close()

    def _run(self, step: int) -> int:
        metrics = MetricsLog(self.home.metrics_file) if self.world.rank == 0 else None
        last = self.config.train.steps
        saves = Saves(self.saver, self.engine, self.reader, self.config, self.home, step=step)
        leave, line = False, Line()
        while step < last and not leave:
            line, leave, asked, failed = self._step(step, saves)
            step += 1
            self.heartbeat("step", step)
            if step == last or (step % self.config.evaluate.every_steps == 0 and not leave):
                line |= self.evaluate(step)
            due = step % self.config.track.every_steps == 0 or "eval/loss" in line
            if metrics and due:
                metrics.write(line)
                log.info("step %d/%d  %s", step, last, format_line(line))
            if failed:
                self.heartbeat("save", step)
                saves.finish()
            if asked or step % self.config.checkpoint.every_steps == 0:
                self.heartbeat("save", step)
                saves.save(step, line, wait=False)
        self.heartbeat("save", step)
        saves.end(step, line)
        if metrics:
            metrics.close()
        self.heartbeat("done", step)
        return step

    def _step(self, step: int, saves: Saves) -> tuple[Line, bool, bool, bool]:
        """One optimizer step; the line that tells of it, and whether any rank was told to leave, asks to save, or knows that it failed."""
        start = time.perf_counter()
        rate = learning_rate(self.config.schedule, peak=self.config.optimizer.learning_rate, step=step, steps=self.config.train.steps)
        self._digest, self._waited = 0, 0.0
        terms_K = self.engine.accumulate(self._microbatches(step))
        every = self.config.guard.replica_check_every_steps
        if every and (step + 1) % every == 0:
            self.engine.replicas.look(step + 1)
        outcome = self.engine.update(terms_K, learning_rate=rate)
        terms, (leave, asked, failed, digest) = self._terms(outcome, saves)
        seconds = time.perf_counter() - start
        self.heartbeat.work = self._waited + self.engine.work.take()
        loss = self.engine.loss(terms)
        if not (math.isfinite(loss) and (outcome.skipped or math.isfinite(outcome.norm))):  # a smaller scale mends gradients alone
            raise FloatingPointError(
                f"step {step + 1}: loss {loss}, gradient norm {outcome.norm}; lower optimizer.learning_rate or lengthen the warmup"
            )
        phase = self.timeline.stage(step)
        speed = phase.global_batch * self.config.data.sequence_length / seconds
        peak = self.peak and self.peak * self.world.size
        line: Line = {
            "step": step + 1,
            "tokens": self.timeline.tokens(step + 1),
            "time": time.time(),
            "train/loss": loss,
            **self._parts("train", terms),
            "global_batch": phase.global_batch,
            "sequence_length": phase.sequence_length,
            "learning_rate": rate,
            "grad_norm": None if outcome.skipped else outcome.norm,
            "tokens_per_second": round(speed, 1),
            "mfu": peak and round(speed * self.flops_per_token[phase.sequence_length] / peak, 4),
            "data_wait": round(self._waited, 6),
            "step_time": round(seconds, 6),
            "memory/peak": self._peak_memory(),
            "data/digest": int(digest) % 2**DIGEST_BITS,
            "world_size": self.world.size,
            "layout": str(self.engine.layout),
            "attempt": self.world.attempt,
        }
        if self.engine.loss_scale is not None:
            line |= {"loss_scale": self.engine.loss_scale, "skipped": outcome.skipped}
        for name, load_E in self.engine.loads.items():
            line[f"load/{name}"] = [round(share, 4) for share in load_E.tolist()]
        if saves.failures:
            line["checkpoint/failures"] = saves.failures
        return line, leave > 0, asked > 0, failed > 0

    def _terms(self, outcome: Outcome, saves: Saves) -> tuple[list[float], list[float]]:
        """Over all ranks: each term of the step's loss; how many were told to leave, ask to save, and know that it failed; and the digest
        of what was read.
        """
        first = self.engine.mesh.is_first_of_sample  # each sample's digest is counted once
        heard = [float(self.notice.signal is not None), *map(float, saves.look())]
        total = self._total(*outcome.terms.tolist(), *heard, float(self._digest if first else 0))
        terms, rest = total[: len(outcome.terms)], total[len(outcome.terms) :]
        return [term / self.engine.layout.tensor for term in terms], list(rest)  # tensor ranks have each told the same

    def _parts(self, prefix: str, terms: Sequence[float], *, leave_out: frozenset[str] = frozenset()) -> Line:
        """A loss of several terms is told term by term, too."""
        names = self.engine.module.terms
        told = dict(zip(names, terms, strict=True)) if len(names) > 1 else {}
        return {f"{prefix}/{name}": term for name, term in told.items() if name not in {"loss"} | leave_out}

    def _microbatches(self, step: int) -> Iterator[Batch]:
        self.heartbeat("read", step)
        for read in self.reader.step(step):
            self._waited += read.wait_seconds
            self._digest += read.digest
            self.heartbeat("read", step)
            yield read.batch
        length = self.timeline.stage(step).sequence_length
        self.heartbeat("step" if length in self._lengths else "compile", step)  # blocks are compiled once for each length
        self._lengths.add(length)

    def evaluate(self, step: int) -> Line:
        """Mean losses over the first `evaluate.samples` validation sequences, dealt over the data ranks."""
        layout, size = self.engine.layout, self.config.train.micro_batch
        count = validation_samples(self.config, self.samples)
        turns = -(-count // (layout.data * size))
        sums: list[float] = []
        for turn in range(turns):  # as many on every rank: weights and experts may lie on others
            self.heartbeat("evaluate", step)
            numbers = (turn * layout.data + self.engine.mesh.data_rank) * size + np.arange(size)
            both = torch.cat(self.engine.evaluate(self.reader.validation(numbers, count))).tolist()
            sums = [a + b for a, b in zip(sums, both, strict=True)] if sums else both
        totals = self._total(*sums)
        half = len(totals) // 2
        terms = [total / max(count, 1) for total, count in zip(totals[:half], totals[half:], strict=True)]
        fillers_count_in = self.engine.module.auxiliary  # they are of all that a batch holds, also where nothing is to be predicted
        return {"eval/loss": self.engine.loss(terms), **self._parts("eval", terms, leave_out=fillers_count_in)}

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


def validation_samples(config: TrainingConfig, samples: Samples | LiveSamples) -> int:
    """How many of the validation windows are evaluated."""
    return min(config.evaluate.samples, samples.validation_windows)
