"""Which checkpoints exist, and which are valid. A valid one matches its manifest in every byte."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from torch import Tensor

from manta.trainer.checkpoint.agreement import all_or_raise, on_first_rank, rank_and_size
from manta.trainer.checkpoint.backend import CheckpointBackend
from manta.trainer.checkpoint.errors import CheckpointError, UnreachableError, read_error
from manta.trainer.checkpoint.manifest import MANIFEST, Checkpoint, first_difference, from_bytes, step_of_name
from manta.trainer.checkpoint.reader import check_headers, check_sizes, read_tensors, read_whole
from manta.trainer.checkpoint.rectangles import TensorViews

log = logging.getLogger(__name__)
Verification = Literal["full", "sizes"]


def read_manifest(backend: CheckpointBackend, name: str) -> Checkpoint:
    """Return a checkpoint. Raises CheckpointError if its manifest is damaged, or if local files are missing or of another size.

    The content of its files is not read.
    """
    location = backend.location(name)
    try:
        checkpoint = from_bytes(backend.manifest(name), location)
    except OSError as error:
        raise read_error(f"{location}/{MANIFEST}", error) from None
    if (step := step_of_name(name)) != checkpoint.progress.step:
        raise CheckpointError(f"{location}: expected step {step}, as its name says, got step {checkpoint.progress.step}")
    if backend.store.is_local:
        check_sizes(backend, checkpoint)
    return checkpoint


def verify(backend: CheckpointBackend, name: str) -> Checkpoint:
    """Read every byte of a checkpoint. Raises CheckpointError with the first problem."""
    checkpoint = read_manifest(backend, name)
    check_headers(backend, checkpoint)
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
            on_first_rank(lambda: _set_aside(backend, bad))
        return checkpoint
    if bad:
        raise CheckpointError(f"{backend}: every checkpoint is bad: {'; '.join(bad.values())}. Restore one, or choose another run.dir.")
    return None


def _set_aside(backend: CheckpointBackend, names: Iterable[str]) -> None:
    for name in names:
        try:
            backend.set_aside(name)
        except OSError as error:
            log.warning("%s: could not be set aside: %s", backend.location(name), error.strerror)


def restore_one(backend: CheckpointBackend, name: str, restore: Callable[[Checkpoint], None]) -> Checkpoint:
    """Restore this checkpoint. Raises CheckpointError on all ranks if one cannot."""
    checkpoint = on_first_rank(lambda: read_manifest(backend, name))
    rank, ranks = rank_and_size()

    def check_and_restore() -> None:
        check_headers(backend, checkpoint, rank=rank, ranks=ranks)
        restore(checkpoint)

    all_or_raise(check_and_restore, CheckpointError)
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
    tensors: dict[str, Tensor] = {}

    def restore(checkpoint: Checkpoint) -> None:
        tensors.clear()
        tensors.update(read_whole(backend, checkpoint, [key for key in checkpoint.tensors if key.startswith("master/")]))

    checkpoint = restore_newest(backend, restore, set_aside=False)
    return None if checkpoint is None else (checkpoint, {key.removeprefix("master/"): tensor for key, tensor in tensors.items()})
