"""The learning rate of a step: a pure function, so that a resumed run needs no state for it."""

import math

from manta.trainer.config.sections import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, *, peak: float, step: int, steps: int) -> float:
    """Return the rate of optimizer step `step` (from 0): linear warmup, then decay to `minimum_ratio` at the last step of the schedule.

    steps: of the run, which are those of the schedule unless schedule.steps is set.
    """
    warmup, steps = schedule.warmup_steps, schedule.steps or steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    ratio = {"cosine": (1 + math.cos(math.pi * min(1.0, progress))) / 2, "linear": 1 - min(1.0, progress), "constant": 1.0}[schedule.shape]
    return peak * (schedule.minimum_ratio + (1 - schedule.minimum_ratio) * ratio)
