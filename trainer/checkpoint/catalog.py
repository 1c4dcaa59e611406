"""Which checkpoints exist, and which are valid. A valid one matches its manifest in every byte."""

import logging
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from manta.trainer.checkpoint.agreement import all_or_raise, on_first_rank, rank_and_size
from manta.trainer.checkpoint.errors import CheckpointError, UnreachableError, read_error
from manta.trainer.checkpoint.manifest import MANIFEST, Checkpoint, first_difference, from_bytes, step_of_name
from manta.trainer.checkpoint.reader import read_tensors
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.storage import CheckpointBackend
from manta.trainer.checkpoint.write_plan import TORCH_DTYPES

log = logging.getLogger(__name__)
Verification = Literal["full", "sizes"]


def read_manifest(backend: CheckpointBackend, name: str) -> Checkpoint:
    """Return a checkpoint without checking its files. Raises CheckpointError if it has no readable manifest."""
    location = backend.location(name)
    try:
        checkpoint = from_bytes(backend.manifest(name), location)
    except OSError as error:
        raise read_error(f"{location}/{MANIFEST}", error) from None
    if (step := step_of_name(name)) != checkpoint.progress.step:
        raise CheckpointError(f"{location}: expected step {step}, as its name says, got step {checkpoint.progress.step}")
    return checkpoint


def verify(backend: CheckpointBackend, name: str) -> Checkpoint:
    """Read every byte of a checkpoint. Raises CheckpointError with the first problem."""
    checkpoint = read_manifest(backend, name)
    read_tensors(backend, checkpoint, {})
    return checkpoint


def restore_newest(backend: CheckpointBackend, restore: Callable[[Checkpoint], None], *, set_aside: bool = True) -> Checkpoint | None:
    """Restore the newest checkpoint that every rank can restore, and return it; None if there are no checkpoints. All ranks call this.

    A checkpoint that one rank finds bad is bad for all: it is skipped, logged, and set aside, so that it is not tried again. Raises
    CheckpointError if all checkpoints are bad, because a run never starts from scratch over them, and UnreachableError if one could not be
    read now, because an older one would cost steps that are saved.
    """
    bad: dict[str, str] = {}
    for name in on_first_rank(backend.names):
        try:
            checkpoint = restore_one(backend, name, restore)
        except UnreachableError:
            raise
        except CheckpointError as error:
            log.warning("skipped a bad checkpoint: %s", error)
            bad[name] = str(error)
            continue
        if set_aside:
            on_first_rank(lambda: [backend.set_aside(name) for name in bad])
        return checkpoint
    if bad:
        raise CheckpointError(f"{backend}: every checkpoint is bad: {'; '.join(bad.values())}. Restore one, or choose another run.dir.")
    return None


def restore_one(backend: CheckpointBackend, name: str, restore: Callable[[Checkpoint], None]) -> Checkpoint:
    """Restore this checkpoint. Raises CheckpointError on all ranks if one cannot."""
    checkpoint = on_first_rank(lambda: read_manifest(backend, name))
    all_or_raise(lambda: restore(checkpoint), CheckpointError)
    return checkpoint


def newest_valid(backend: CheckpointBackend) -> Checkpoint | None:
    """Return the newest valid checkpoint, with every byte read; None if there are no checkpoints. Changes nothing."""
    return restore_newest(backend, lambda checkpoint: read_tensors(backend, checkpoint, {}), set_aside=False)


def load(
    backend: CheckpointBackend,
    checkpoint: Checkpoint,
    state: Mapping[str, TensorViews],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    verify: Verification,
) -> None:
    """Fill this rank's `state`. Reads the blocks that it needs, and for a full verification also this rank's part of the others.

    shapes: of every tensor of the whole model. Raises CheckpointError if the checkpoint has other tensors, other shapes, or a file that
    does not match its manifest: part of `state` may be filled then.
    """
    if shapes != checkpoint.shapes:
        difference = first_difference(shapes, checkpoint.shapes)
        raise CheckpointError(f"{checkpoint.location}: {difference}. Use the model and optimizer that wrote it.")
    read_tensors(backend, checkpoint, state, check_hashes=verify == "full", check_files=rank_and_size())


def load_newest_weights(backend: CheckpointBackend) -> tuple[Checkpoint, dict[str, Tensor]] | None:
    """Return the newest valid checkpoint and its whole master weights by parameter name, or None if there are no checkpoints."""
    weights: dict[str, Tensor] = {}

    def restore(checkpoint: Checkpoint) -> None:
        weights.clear()
        for key, stored in checkpoint.tensors.items():
            if key.startswith("master/"):
                weights[key.removeprefix("master/")] = torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype])
        read_tensors(backend, checkpoint, {f"master/{name}": TensorViews.from_whole(tensor) for name, tensor in weights.items()})

    checkpoint = restore_newest(backend, restore, set_aside=False)
    return None if checkpoint is None else (checkpoint, weights)
