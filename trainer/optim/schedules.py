"""The learning rate of a step: a pure function, so a resumed run needs no state of it."""

import math

from manta.trainer.config.training import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, *, peak: float, step: int, steps: int) -> float:
    """For optimizer step `step` (from 0) of `steps`: linear warmup, then the shape's fall to `minimum_ratio` at the last step."""
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    fall = (step - warmup) / max(1, steps - 1 - warmup)
    remains = {"cosine": (1 + math.cos(math.pi * min(1.0, fall))) / 2, "linear": 1 - min(1.0, fall), "constant": 1.0}[schedule.shape]
    return peak * (schedule.minimum_ratio + (1 - schedule.minimum_ratio) * remains)
