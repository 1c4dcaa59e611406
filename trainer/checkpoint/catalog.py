"""Which checkpoints there are, and which of them count: those that hold, byte by byte, what their manifest says."""

import logging
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from manta.trainer.checkpoint.agreement import all_or_none, first_says, rank_of_ranks
from manta.trainer.checkpoint.backend import CheckpointBackend
from manta.trainer.checkpoint.errors import CheckpointError, UnreachableError, unreadable
from manta.trainer.checkpoint.manifest import MANIFEST, Checkpoint, difference, from_bytes, step_of
from manta.trainer.checkpoint.reader import read
from manta.trainer.checkpoint.shards import Pieces
from manta.trainer.checkpoint.write_plan import TORCH

log = logging.getLogger(__name__)
Verify = Literal["full", "sizes"]


def look(where: CheckpointBackend, name: str) -> Checkpoint:
    """What its manifest says; its files have not been looked at. Raises CheckpointError where it has none that can be read."""
    try:
        checkpoint = from_bytes(where.manifest(name), where.location(name))
    except OSError as error:
        raise unreadable(f"{where.location(name)}/{MANIFEST}", error) from None
    if (step := step_of(name)) != checkpoint.progress.step:
        raise CheckpointError(f"{checkpoint.at}: holds step {checkpoint.progress.step}, wants step {step}, as its name says")
    return checkpoint


def validation_loss(where: CheckpointBackend, name: str) -> float | None:
    """What was measured at its step; None where nothing was, or its manifest can not be read: a bad one is not among the best."""
    try:
        return look(where, name).about.get("validation_loss")
    except CheckpointError:
        return None


def verify(where: CheckpointBackend, name: str) -> Checkpoint:
    """Reads every byte of the checkpoint. Raises CheckpointError with the first thing that is not as its manifest says."""
    checkpoint = look(where, name)
    read(where, checkpoint, {})
    return checkpoint


def take_newest(where: CheckpointBackend, take: Callable[[Checkpoint], None], *, set_aside: bool = True) -> Checkpoint | None:
    """The newest checkpoint that every rank could take, and has taken; None where there never was one. All ranks call this together.

    What one rank finds bad is bad for all: it is passed over, told of, and set aside, so that it is met no second time. Raises
    CheckpointError where there are checkpoints and all are bad: a run never starts afresh over them. And UnreachableError where one
    could not be read now: to go back behind it would cost steps that are saved.
    """
    passed_over: dict[str, str] = {}
    for name in first_says(where.names):
        try:
            checkpoint = take_one(where, name, take)
        except UnreachableError:
            raise
        except CheckpointError as error:
            log.warning("passed over a bad checkpoint: %s", error)
            passed_over[name] = str(error)
            continue
        if set_aside:
            first_says(lambda: [where.set_aside(bad) for bad in passed_over])
        return checkpoint
    if passed_over:
        told = "; ".join(passed_over.values())
        raise CheckpointError(f"{where}: every checkpoint is bad: {told}; restore one, or choose another run.dir")
    return None


def take_one(where: CheckpointBackend, name: str, take: Callable[[Checkpoint], None]) -> Checkpoint:
    """This checkpoint and no other. Raises CheckpointError on all ranks where one could not take it."""
    checkpoint = first_says(lambda: look(where, name))
    all_or_none(lambda: take(checkpoint), CheckpointError)
    return checkpoint


def newest(where: CheckpointBackend) -> Checkpoint | None:
    """As `take_newest`, with every byte read and nothing taken, or changed."""
    return take_newest(where, lambda checkpoint: read(where, checkpoint, {}), set_aside=False)


def load(
    where: CheckpointBackend, checkpoint: Checkpoint, state: Mapping[str, Pieces], wanted: Mapping[str, tuple[int, ...]], *, verify: Verify
) -> None:
    """Fills this rank's `state` in place; it reads the blocks that it needs, and its part of the others where they are to be verified.

    `wanted` names every tensor of the whole model. Raises CheckpointError where the checkpoint has another set, or other shapes, or a
    file that is not as its manifest says: then part of `state` may have been filled.
    """
    if wanted != (shapes := checkpoint.shapes):
        raise CheckpointError(f"{checkpoint.at}: {difference(wanted, shapes)}; was it another model or optimizer?")
    read(where, checkpoint, state, hashes=verify == "full", rest=rank_of_ranks())


def newest_weights(where: CheckpointBackend) -> tuple[Checkpoint, dict[str, Tensor]] | None:
    """Of the newest valid checkpoint the masters, whole, by parameter name: for a process that trains nothing. None where there is none."""
    weights: dict[str, Tensor] = {}

    def take(checkpoint: Checkpoint) -> None:
        weights.clear()
        for key, stored in checkpoint.tensors.items():
            if key.startswith("master/"):
                weights[key.removeprefix("master/")] = torch.empty(stored.shape, dtype=TORCH[stored.dtype])
        read(where, checkpoint, {f"master/{name}": Pieces.all_of(tensor) for name, tensor in weights.items()})

    checkpoint = take_newest(where, take, set_aside=False)
    return None if checkpoint is None else (checkpoint, weights)
