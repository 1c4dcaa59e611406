"""Where checkpoints lie, and which of them count.

One directory a step. It is written beside its place and renamed into it whole; its manifest names every file with size and
hash, and every tensor with its shape. What has no manifest, or does not match it, does not count.
"""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_pieces
from torch.distributed.checkpoint.state_dict_saver import save as write_pieces

from manta.data.durable import sync_directory, write_atomically
from manta.trainer.checkpoint.errors import CheckpointError

log = logging.getLogger(__name__)
FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run has come. Everything else about its position follows from its config."""

    step: int  # optimizer steps taken
    samples_consumed: int
    optimizer_steps: int  # steps counted by the optimizer's bias correction
    loss_scaler: dict[str, float] | None = None  # fp16: where the dynamic loss scale stands
    cursors: list[dict[str, int]] | None = None  # data.live: where each data rank stands in its text


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed checkpoint."""

    path: Path
    progress: Progress
    tensors: dict[str, tuple[int, ...]]
    identity: dict[str, str]  # fingerprints of what the weights depend on


def save(directory: Path, state: Mapping[str, Any], progress: Progress, *, identity: Mapping[str, str], attempt: int, keep: int) -> Path:
    """All ranks call this together; a process that is no rank calls it alone. Gives the committed path; until then nothing of it counts.

    Raises OSError where the disk says so; checkpoints that were there stay as they are.
    """
    final = directory / _name(progress.step)
    partial = directory / f".{final.name}.attempt-{attempt:04d}.partial"
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
        metadata = write_pieces(dict(state), storage_writer=FileSystemWriter(partial, sync_files=True), no_dist=not dist.is_initialized())
    files = [{p.name: _describe(p) for p in sorted(partial.glob(f"__{rank}_*"))}] * ranks
    if ranks > 1:
        dist.all_gather_object(files, files[0])
    if rank == 0:
        tensors = {k: list(v.size) for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        described = {".metadata": _describe(partial / ".metadata")} | {n: d for held in files for n, d in held.items()}
        manifest = {"format": FORMAT, **asdict(progress), "identity": dict(identity), "files": described, "tensors": tensors}
        write_atomically(partial / MANIFEST, json.dumps(manifest | {"xxh3": _digest(manifest)}, indent=1).encode())
        if final.exists():  # a resumed run has come here again: the newer one is as good, and whole
            shutil.rmtree(final)
        partial.rename(final)
        sync_directory(directory)
        write_atomically(directory / "latest", f"{final.name}\n".encode())
        _prune(directory, final, keep)
    if ranks > 1:
        dist.barrier()
    return final


def newest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint that holds what its manifest says, every byte hashed. None where there never was one.

    Raises CheckpointError where there are checkpoints and all are bad: a run never starts afresh over them.
    """
    passed_over: list[str] = []
    for path in committed(directory):
        try:
            checkpoint = verify(path)
        except CheckpointError as error:
            log.warning("passed over a bad checkpoint: %s", error)
            passed_over.append(str(error))
        else:
            return checkpoint
    if passed_over:
        raise CheckpointError(f"{directory}: every checkpoint is bad: {'; '.join(passed_over)}; restore one, or choose another run.dir")
    return None


def find(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest valid one of the run or import there. An explicit one is taken or refused, never passed over.

    Raises CheckpointError where there is none, or none that holds what its manifest says.
    """
    if (path / MANIFEST).exists() and path.name.startswith("step-"):
        return verify(path)
    found = newest(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path}: got no checkpoint there, wants a run's directory, an imported one, or checkpoints/step-...")
    return found


def committed(directory: Path) -> list[Path]:
    """Checkpoints under their final name, newest first."""
    return sorted((p for p in directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)), reverse=True)


def verify(path: Path) -> Checkpoint:
    """Reads every byte of the checkpoint. Raises CheckpointError with the first thing that is not as its manifest says."""
    manifest = read_manifest(path)
    for name, wanted in manifest["files"].items():
        try:
            found = _describe(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from None
        for key in ("bytes", "xxh3"):
            if found[key] != wanted[key]:
                raise CheckpointError(f"{path / name}: {key}: got {found[key]}, wants {wanted[key]}")
    return _checkpoint(path, manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises CheckpointError where there is none, it is of another format, or not as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        form, written = manifest["format"], manifest.pop("xxh3")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: {type(error).__name__}: {error}") from None
    if form != FORMAT:
        raise CheckpointError(f"{path}: format: got {form}, wants {FORMAT}; use the manta that wrote it")
    if (found := _digest(manifest)) != written:
        raise CheckpointError(f"{path / MANIFEST}: xxh3: got {found}, wants {written}")
    if path.name != _name(manifest["step"]):
        raise CheckpointError(f"{path}: holds step {manifest['step']}, wants the directory {_name(manifest['step'])}")
    return manifest


def load(checkpoint: Checkpoint, state: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Fills `state` in place; each rank reads only its own pieces. All ranks call this together.

    `wanted` names every tensor of the whole model. Raises CheckpointError where the checkpoint has another set, or other shapes.
    """
    if wanted != checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.path}: {difference(wanted, checkpoint.tensors)}; was it another model or optimizer?")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
        read_pieces(dict(state), storage_reader=FileSystemReader(checkpoint.path))


def load_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The fp32 masters, whole, by parameter name: for one process that trains nothing."""
    prefix = "master/"
    weights = {k: torch.empty(shape) for k, shape in checkpoint.tensors.items() if k.startswith(prefix)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
        read_pieces(weights, storage_reader=FileSystemReader(checkpoint.path), no_dist=True)
    return {k.removeprefix(prefix): tensor for k, tensor in weights.items()}


def set_aside(directory: Path, resumed: Checkpoint) -> None:
    """What lies ahead of the checkpoint that a run goes on from was passed over: under another name, it is met no second time."""
    for path in committed(directory):
        if path.name > resumed.path.name:
            path.rename(path.with_name(f"bad-{path.name}"))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _digest(manifest: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _checkpoint(path: Path, manifest: Mapping[str, Any]) -> Checkpoint:
    progress = Progress(
        **{k: manifest[k] for k in Progress.__dataclass_fields__ if k in manifest}
    )  # older ones knew no loss scaler and no cursors
    tensors = {k: tuple(shape) for k, shape in manifest["tensors"].items()}
    return Checkpoint(path=path, progress=progress, tensors=tensors, identity=manifest["identity"])


def difference(wanted: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]) -> str:
    """In words, the first in order of name: of what is missing, surplus or of another shape."""

    def lines() -> Iterator[str]:
        for key in sorted(wanted.keys() | got.keys()):
            if wanted.get(key) != got.get(key):
                yield f"{key}: got {got.get(key, 'nothing')}, wants {wanted.get(key, 'nothing')}"

    found = list(lines())
    return found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def _describe(path: Path) -> dict[str, int | str]:
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
        return {"bytes": file.tell(), "xxh3": hasher.hexdigest()}


def _prune(directory: Path, newest: Path, keep: int) -> None:
    """Removes checkpoints older than the newest `keep`, and what a dead attempt left half written. What lies ahead of `newest` was
    passed over as bad: it does not count among those kept.
    """
    kept = [path for path in committed(directory) if path.name <= newest.name]
    for path in [*kept[keep:], *directory.glob(".step-*.partial")]:
        shutil.rmtree(path, ignore_errors=True)
