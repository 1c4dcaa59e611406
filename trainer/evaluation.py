"""Validation: losses and figures of the held-out samples and of the validation sets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from manta.cluster.protocol import HeartbeatWriter
from manta.data.live.live_samples import LiveSamples
from manta.data.objectives.examples import Examples
from manta.data.sampling.samples import Samples
from manta.trainer.config.training import TrainingConfig
from manta.trainer.dataloader.loader import DataLoader
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.engine.token_sums import SourceSums, TokenSums
from manta.trainer.metrics import Line


@dataclass(frozen=True)
class Evaluation:
    """All ranks evaluate together."""

    config: TrainingConfig
    samples: Samples | LiveSamples
    engine: Engine
    loader: DataLoader
    world: World
    heartbeat: HeartbeatWriter
    sets: Mapping[str, Samples]

    def run(self, step: int, *, stop: bool = False) -> Line:
        """Evaluate what is due at this step. Return the mean losses and figures of the held-out samples and of each validation set.

        stop: whether training ends here, unfinished; then only the last step is evaluated.
        """
        config, samples, line = self.config.evaluate, self.samples, Line()

        def is_due(every: int) -> bool:
            return step == self.config.train.steps or (step % every == 0 and not stop)

        if samples.validation_windows and is_due(config.every_steps):
            line |= self._evaluate(step, samples.validation, min(config.samples, samples.validation_windows), "eval", samples.source_names)
        for one in config.sets:
            if is_due(one.every_steps or config.every_steps):
                text = self.sets[one.name]
                line |= self._evaluate(step, text.train, min(one.samples, text.train_windows), f"eval/{one.name}")
        return line

    def _evaluate(
        self, step: int, read: Callable[[NDArray[np.integer]], Examples], count: int, prefix: str, names: Sequence[str] = ()
    ) -> Line:
        """Evaluate the first `count` samples of `read`, which the data ranks share. names: of its sources."""
        layout, size, K = self.engine.layout, self.config.train.micro_batch, len(self.engine.module.terms)
        totals_2K = torch.zeros(2 * K, dtype=torch.float64, device=self.world.device)
        sums = TokenSums(max(1, len(self.samples.source_names)), self.samples.token_bytes)
        for micro_step in range(-(-count // (layout.data * size))):  # the same number on every rank: weights and experts may be on others
            self.heartbeat("evaluate", step)
            numbers = (micro_step * layout.data + self.engine.mesh.data_rank) * size + np.arange(size)
            totals_2K += torch.cat(self.engine.evaluate(self.loader.validation(read, numbers, count), sums))
        totals = self.world.sum([*totals_2K.tolist(), *sums.values.flat])
        terms = [total / max(count, 1) for total, count in zip(totals[:K], totals[K : 2 * K], strict=True)]
        # Auxiliary terms are of everything in a batch, also of samples that only fill it.
        named = self.engine.named_terms(terms, exclude=self.engine.module.auxiliary)
        line: Line = {f"{prefix}/loss": self.engine.loss(terms), **{f"{prefix}/{name}": term for name, term in named.items()}}
        by_source = SourceSums.of(totals[2 * K :])
        total = by_source.total()
        overall = {"perplexity": np.exp(total.mean_losses()), "bits_per_byte": total.bits_per_byte()}
        if self.config.data.objective == "masked":
            overall["accuracy"] = total.accuracy()
        line |= by_name(prefix, list(overall), np.concatenate(list(overall.values())))
        if len(names) > 1:
            line |= by_name(f"{prefix}/loss", names, by_source.mean_losses())
            line |= by_name(f"{prefix}/bits_per_byte", names, by_source.bits_per_byte())
        return line


def by_name(key: str, names: Sequence[str], values: Sequence[float] | NDArray[np.float64]) -> Line:
    """Return a part of a line: the finite ones of these values."""
    return {f"{key}/{name}": float(value) for name, value in zip(names, values, strict=True) if np.isfinite(value)}
