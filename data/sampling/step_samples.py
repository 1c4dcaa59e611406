"""Which samples each step reads: the global batch and the sequence length of every step, known before the run starts.

A sample always holds `data.sequence_length` tokens. A curriculum cuts samples into shorter sequences and a batch ramp reads fewer samples
per step; neither changes the order of samples. A stage takes effect at the first step that starts at or after its number of tokens.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

Stages = Sequence[tuple[int, int]]  # the first token of each, and its value


class TimelineStage(NamedTuple):
    """Consecutive steps with the same global batch and sequence length."""

    first_step: int
    first_sample: int
    """The first sample of `first_step`."""
    global_batch: int
    """Samples per step."""
    sequence_length: int


class Timeline:
    """The stages of a run."""

    def __init__(self, *, sequence_length: int, global_batch: int, ramp: Stages = (), curriculum: Stages = ()) -> None:
        """ramp: (tokens, global batch) pairs; curriculum: (tokens, sequence length) pairs. The first pair of each is at 0 tokens."""
        batches, lengths = list(ramp) or [(0, global_batch)], list(curriculum) or [(0, sequence_length)]
        batch_starts, length_starts = [start for start, _ in batches], [start for start, _ in lengths]
        stages: list[TimelineStage] = []
        for tokens in sorted({start for start, _ in (*batches, *lengths)}):
            step, sample = _first_step_from(tokens, stages[-1], sequence_length) if stages else (0, 0)
            if stages and step == stages[-1].first_step:  # the previous stage is shorter than a step
                stages.pop()
            batch, length = _value_at(batches, batch_starts, tokens), _value_at(lengths, length_starts, tokens)
            stages.append(TimelineStage(first_step=step, first_sample=sample, global_batch=batch, sequence_length=length))
        self.stages = tuple(stages)
        self.sequence_length = sequence_length

    def stage(self, step: int) -> TimelineStage:
        """Return the stage of a step; steps count from 0."""
        return self.stages[bisect_right(self.stages, step, key=lambda stage: stage.first_step) - 1]

    def first_sample(self, step: int) -> int:
        """Return the first sample of a step, which is the number of samples read before it."""
        stage = self.stage(step)
        return stage.first_sample + (step - stage.first_step) * stage.global_batch

    def tokens(self, steps: int) -> int:
        """Return the number of tokens that the first `steps` steps read."""
        return self.first_sample(steps) * self.sequence_length


def _first_step_from(tokens: int, stage: TimelineStage, sequence_length: int) -> tuple[int, int]:
    """Return the first step, and its first sample, at or after a number of tokens, if `stage` lasts until then."""
    missing = max(0, tokens - stage.first_sample * sequence_length)
    steps = -(-missing // (stage.global_batch * sequence_length))
    return stage.first_step + steps, stage.first_sample + steps * stage.global_batch


def _value_at(stages: Stages, starts: Sequence[int], tokens: int) -> int:
    return stages[bisect_right(starts, tokens) - 1][1]
