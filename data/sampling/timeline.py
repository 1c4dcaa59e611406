"""Which samples a step reads, how many, and how long their sequences are: all of a run's steps, known beforehand.

A sample always holds `data.sequence_length` tokens. A curriculum cuts it into shorter sequences, a ramp takes fewer of them a step, and
neither changes which sample comes next. Stages begin at a number of tokens and take effect at the first step that starts there or later.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Steps that are alike, from `step` on, until the next phase begins."""

    step: int
    sample: int
    """The first sample number of its first step."""
    global_batch: int
    """Samples a step."""
    sequence_length: int


class Timeline:
    """The phases of a run. A stage is (tokens read when it begins, its value); the first begins at 0."""

    def __init__(
        self,
        *,
        sequence_length: int,
        global_batch: int,
        ramp: Sequence[tuple[int, int]] = (),
        curriculum: Sequence[tuple[int, int]] = (),
    ) -> None:
        batches, lengths = list(ramp) or [(0, global_batch)], list(curriculum) or [(0, sequence_length)]
        phases: list[Phase] = []
        for tokens in sorted({begin for begin, _ in (*batches, *lengths)}):
            step, sample = _reached(phases[-1], tokens, sequence_length) if phases else (0, 0)
            if phases and step == phases[-1].step:  # a stage shorter than a step has none
                phases.pop()
            batch, length = _in_force(batches, tokens), _in_force(lengths, tokens)
            phases.append(Phase(step=step, sample=sample, global_batch=batch, sequence_length=length))
        self.phases = tuple(phases)
        self.sequence_length = sequence_length
        self._steps, self._samples = [phase.step for phase in phases], [phase.sample for phase in phases]

    def phase(self, step: int) -> Phase:
        """The one that this step, counted from 0, is of."""
        return self.phases[bisect_right(self._steps, step) - 1]

    def first_sample(self, step: int) -> int:
        """The first sample number of this step: as many samples were read in the steps before it."""
        phase = self.phase(step)
        return phase.sample + (step - phase.step) * phase.global_batch

    def step_of(self, sample: int) -> int:
        """The step that reads this sample number."""
        phase = self.phases[bisect_right(self._samples, sample) - 1]
        return phase.step + (sample - phase.sample) // phase.global_batch

    def tokens(self, steps: int) -> int:
        """Read in the first `steps` steps."""
        return self.first_sample(steps) * self.sequence_length


def _reached(phase: Phase, tokens: int, sequence_length: int) -> tuple[int, int]:
    """The first step, and its first sample, that starts at so many tokens or later, while the phase goes on."""
    missing = max(0, tokens - phase.sample * sequence_length)
    steps = -(-missing // (phase.global_batch * sequence_length))
    return phase.step + steps, phase.sample + steps * phase.global_batch


def _in_force(stages: Sequence[tuple[int, int]], tokens: int) -> int:
    return next(value for begin, value in reversed(stages) if begin <= tokens)
