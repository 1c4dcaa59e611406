"""`manta checkpoint list`: which checkpoints exist, from their manifests."""

from typing import Any

from rich.filesize import decimal
from rich.table import Table

from manta.data.errors import InputError
from manta.launch.inspect.charts import console
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.manifest import Checkpoint, from_bytes
from manta.trainer.checkpoint.storage import CheckpointBackend
from manta.trainer.run_directory import resolve_start_from

Report = dict[str, Any]


def select_checkpoints(source: str) -> tuple[CheckpointBackend, list[str]]:
    """Return the names of the checkpoints that the argument means, newest first. Raises InputError if there are none."""
    backend, name = resolve_start_from(source)
    names = backend.names()
    if name is not None:
        names = [name] if name in names else []
    if not names:
        raise InputError(f"{source}: expected checkpoints, got none. Name a run's directory, an imported one, or checkpoints/step-...")
    return backend, names


def list_checkpoints(source: str) -> Report:
    backend, names = select_checkpoints(source)
    rows: list[Report] = []
    for name in names:
        try:
            rows.append({"name": name, "error": None, **summary(from_bytes(backend.manifest(name), backend.location(name)))})
        except (CheckpointError, OSError) as error:
            rows.append({"name": name, "error": str(error)})
    return {"at": str(backend), "checkpoints": rows, "bad": backend.bad()}


def summary(checkpoint: Checkpoint) -> Report:
    """Return what a manifest says, without the tensors."""
    return {
        "step": checkpoint.progress.step,
        "samples": checkpoint.progress.samples_consumed,
        "bytes": checkpoint.bytes,
        "files": len(checkpoint.files),
        "tensors": len(checkpoint.tensors),
        **{key: checkpoint.about.get(key) for key in ("written", "layout", "ranks", "attempt", "validation_loss")},
    }


def show(report: Report) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("checkpoint", "written", "size", "validation loss", "by")
    for row in report["checkpoints"]:
        if row["error"]:
            table.add_row(row["name"], f"bad: {row['error']}")
            continue
        loss = "" if row["validation_loss"] is None else f"{row['validation_loss']:.4f}"
        layout = "" if row["layout"] is None else f"{row['ranks']} x {row['layout']}"
        table.add_row(row["name"], row["written"] or "", decimal(row["bytes"]), loss, layout)
    for name in report["bad"]:
        table.add_row(name, "set aside as bad")
    out = console()
    out.print(report["at"])
    out.print(table)
