"""Which checkpoints are kept: a decision made from names and losses, and nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from manta.trainer.checkpoint.manifest import step_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    newest: int
    best: int = 0  # of the lowest validation loss
    every: int | None = None  # steps whose multiples are kept for ever


def surplus(names: Sequence[str], newest: str, keep: Keep, loss: Callable[[str], float | None]) -> list[str]:
    """Which of `names` may go, oldest last, where `newest` is the newest that is known to be good.

    loss: of a checkpoint, asked only where it matters; None where none was measured at its step. What lies ahead of `newest` was passed
    over as bad: it is left alone, and does not count among those kept.
    """
    steps = {name: step for name in names if (step := step_of(name)) is not None}
    known = sorted((name for name in steps if steps[name] <= steps.get(newest, -1)), key=lambda name: steps[name], reverse=True)
    kept = {newest, *known[: keep.newest]}
    if keep.every is not None:
        kept |= {name for name in known if steps[name] % keep.every == 0}
    if keep.best and len(known) > len(kept):
        losses = [(told, -steps[name], name) for name in known if (told := loss(name)) is not None]
        kept |= {name for _, _, name in sorted(losses)[: keep.best]}
    return [name for name in known if name not in kept]
