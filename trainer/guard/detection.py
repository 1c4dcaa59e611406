"""Which steps are spikes: a loss or a gradient norm above the mean of the steps before by several standard deviations.

As in OLMo-core's SkipStepOptimizer: a window of 128 steps, once it is half full, and 6 standard deviations (of a sample: n - 1). A spike
enters the window as the limit that it exceeded. So one spike hides no later one, and after a lasting change the limit follows.
"""

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from manta.data.sampling.samples import sample_numbers
from manta.data.sampling.step_samples import Timeline
from manta.trainer.config.sections import GuardConfig
from manta.trainer.config.training import TrainingConfig
from manta.trainer.guard.record import Kind


class Measured(NamedTuple):
    """Of a step, over all ranks; also limits for both."""

    loss: float
    grad_norm: float


NO_LIMITS = Measured(math.inf, math.inf)


class SpikeDetector:
    """The same on every rank, since loss and norm are."""

    def __init__(self, config: GuardConfig, window: Iterable[Sequence[float]] = ()) -> None:
        """window: that of a checkpoint, so that a resumed run finds the same spikes."""
        self._config = config
        self.window = deque((Measured(*pair) for pair in window), maxlen=config.spike_window)
        """Losses and gradient norms of the last steps, oldest first."""
        self._limits: Measured | None = None  # None: to be computed

    def limits(self) -> Measured:
        """Return the limits for the next step; infinite while the window is less than half full."""
        if self._limits is None:
            is_enough = len(self.window) >= max(2, self._config.spike_window // 2)
            self._limits = Measured(*map(self._limit, zip(*self.window, strict=True))) if is_enough else NO_LIMITS
        return self._limits

    def kind(self, step: Measured) -> Kind | None:
        """Return what is wrong with a step, if anything."""
        if not all(map(math.isfinite, step)):
            return "not-finite"
        return "spike" if any(value > limit for value, limit in zip(step, self.limits(), strict=True)) else None

    def add(self, step: Measured) -> None:
        """Add a finished step to the window, unless it is not finite."""
        if all(map(math.isfinite, step)):
            self.window.append(Measured(*map(min, step, self.limits())))
            self._limits = None

    def clear(self) -> None:
        """Forget the steps so far, because the next ones are not comparable."""
        self.window.clear()
        self._limits = None

    def _limit(self, values: Sequence[float]) -> float:
        # math.fsum is exact: ranks on other processors must find the same limit.
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) * (value - mean) for value in values) / (len(values) - 1)
        return mean + self._config.spike_deviations * math.sqrt(variance)


def is_comparable(config: TrainingConfig, timeline: Timeline, step: int) -> bool:
    """Whether a step, from 0, reads batches and sequences of the same size as the one before, from the same stage of the mixture."""
    if step == timeline.stage(step).first_step:
        return False
    last = sample_numbers(config.data.skip, np.array([timeline.first_sample(step) - 1, timeline.first_sample(step + 1) - 1]))
    starts = [-(-stage.from_tokens // config.data.sequence_length) for stage in config.data.mixture]
    before, now = (bisect_right(starts, number) for number in last.tolist())
    return before == now
