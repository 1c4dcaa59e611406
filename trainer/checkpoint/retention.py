"""Which checkpoints are kept, and the deletion of the others."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from manta.trainer.checkpoint.backend import CheckpointBackend
from manta.trainer.checkpoint.catalog import read_manifest
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.manifest import step_of_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which checkpoints are kept."""

    newest: int
    best: int = 0  # with the lowest validation loss
    every: int | None = None  # steps: multiples are kept forever


def validation_loss(backend: CheckpointBackend, name: str) -> float | None:
    """Return the loss measured at a checkpoint's step; None if none was, or if it is not finite, or if the manifest is damaged."""
    try:
        loss = read_manifest(backend, name).about.validation_loss
    except CheckpointError:
        return None
    return loss if loss is not None and math.isfinite(loss) else None


def surplus(names: Sequence[str], newest: str, retention: Retention, loss: Callable[[str], float | None]) -> list[str]:
    """Return which of `names` may be deleted, oldest last.

    newest: the newest that is known to be valid. Later ones are bad: they are neither deleted nor counted. loss: a checkpoint's validation
    loss, None if none was measured; called only if it matters.
    """
    steps = {name: step for name in names if (step := step_of_name(name)) is not None}
    known = sorted((name for name in steps if steps[name] <= steps.get(newest, -1)), key=lambda name: steps[name], reverse=True)
    kept = {newest, *known[: retention.newest]}
    if retention.every is not None:
        kept |= {name for name in known if steps[name] % retention.every == 0}
    if retention.best and len(known) > len(kept):
        losses = [(value, -steps[name], name) for name in known if (value := loss(name)) is not None]
        kept |= {name for _, _, name in sorted(losses)[: retention.best]}
    return [name for name in known if name not in kept]


def delete_surplus(backend: CheckpointBackend, newest: str, retention: Retention, *, token: str) -> None:
    """Delete what is not kept, never the newest, and only while the attempt with this token holds the fence."""
    for name in surplus(backend.names(), newest, retention, partial(validation_loss, backend)):
        if backend.is_fence_held_by(token):
            backend.delete(name)
