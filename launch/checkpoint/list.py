"""`manta checkpoint list`: which checkpoints there are, from their manifests alone."""

from typing import Any

from rich.table import Table

from manta.data.errors import InputError
from manta.launch.inspect.charts import console
from manta.trainer.checkpoint.backend import CheckpointBackend
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.manifest import Checkpoint, from_bytes
from manta.trainer.run_directory import resolve_start_from

Told = dict[str, Any]


def found(where: str) -> tuple[CheckpointBackend, list[str]]:
    """Where they lie, and the names of those that are meant, newest first. Raises InputError where there are none."""
    place, name = resolve_start_from(where)
    names = place.names()
    if name is not None:
        names = [name] if name in names else []
    if not names:
        raise InputError(f"{where}: got no checkpoint there, wants a run's directory, an imported one, or checkpoints/step-...")
    return place, names


def checkpoints(where: str) -> Told:
    place, names = found(where)
    return {"at": str(place), "checkpoints": [_told(place, name) for name in names], "bad": place.bad()}


def _told(place: CheckpointBackend, name: str) -> Told:
    try:
        checkpoint = from_bytes(place.manifest(name), place.location(name))
    except (CheckpointError, OSError) as error:
        return {"name": name, "error": str(error)}
    return {"name": name, "error": None, **facts(checkpoint)}


def facts(checkpoint: Checkpoint) -> Told:
    """What a manifest says, tensors apart."""
    about = checkpoint.about
    return {
        "step": checkpoint.progress.step,
        "samples": checkpoint.progress.samples_consumed,
        "bytes": checkpoint.bytes,
        "files": len(checkpoint.files),
        "tensors": len(checkpoint.tensors),
        **{key: about.get(key) for key in ("written", "layout", "ranks", "attempt", "validation_loss")},
    }


def show(told: Told) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("checkpoint", "written", "size", "validation loss", "by")
    for one in told["checkpoints"]:
        if one["error"]:
            table.add_row(one["name"], f"bad: {one['error']}")
            continue
        loss = "" if one["validation_loss"] is None else f"{one['validation_loss']:.4f}"
        by = "" if one["layout"] is None else f"{one['ranks']} x {one['layout']}"
        table.add_row(one["name"], one["written"] or "", size(one["bytes"]), loss, by)
    for name in told["bad"]:
        table.add_row(name, "set aside as bad")
    out = console()
    out.print(told["at"], soft_wrap=True)
    out.print(table)


def size(count: int) -> str:
    """1,234,567 -> 1.2 MB."""
    for unit, each in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= each:
            return f"{count / each:.1f} {unit}"
    return f"{count / 1000:.1f} kB"
