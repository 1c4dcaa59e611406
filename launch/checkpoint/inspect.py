"""`manta checkpoint list`, `verify` and `inspect`: read manifests, all bytes, or tensor by tensor."""

import time
from fnmatch import fnmatchcase
from typing import Any

import torch
from rich.filesize import decimal

from manta.data.errors import InputError
from manta.launch.inspect.charts import console, grid
from manta.launch.terminal import count_text, notify
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.backend import CheckpointBackend
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.manifest import Checkpoint
from manta.trainer.checkpoint.reader import check_headers, read_whole
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
            rows.append({"name": name, "error": None, **summary(catalog.read_manifest(backend, name))})
        except CheckpointError as error:
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
        **{key: getattr(checkpoint.about, key) for key in ("written", "layout", "ranks", "attempt", "validation_loss")},
    }


def show_listed(report: Report) -> None:
    table = grid(5)
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


def verify(source: str) -> list[Report]:
    """Return for each checkpoint what is wrong with it, if anything."""
    backend, names = select_checkpoints(source)
    reports: list[Report] = []
    for name in names:
        start, error, count = time.perf_counter(), None, 0
        try:
            count = catalog.verify(backend, name).bytes
        except CheckpointError as damage:
            error = str(damage)
        reports.append({"at": backend.location(name), "bytes": count, "seconds": time.perf_counter() - start, "error": error})
    return reports


def show_verified(reports: list[Report]) -> None:
    for report in reports:
        rate = int(report["bytes"] / max(report["seconds"], 1e-9))
        verdict = f"bad: {report['error']}" if report["error"] else f"valid: {decimal(report['bytes'])}, {decimal(rate)}/s"
        console().print(f"{report['at']}  {verdict}")


def inspect(source: str, match: str) -> Report:
    """Raises InputError if there is no checkpoint, or no weight of such a name, and CheckpointError if what is read is damaged."""
    backend, names = select_checkpoints(source)
    checkpoint = _newest_readable(backend, names)
    keys = [key for key in checkpoint.tensors if fnmatchcase(key.partition("/")[2], match)]
    if not keys:
        some = ", ".join(list(dict.fromkeys(key.partition("/")[2] for key in checkpoint.tensors))[:3])
        raise InputError(f"--match: expected weights of {checkpoint.location}, such as {some}, got {match!r}. Try 'blocks.*'.")
    check_headers(backend, checkpoint)
    weights: dict[str, Report] = {}
    for key in keys:
        state, _, name = key.partition("/")
        weights.setdefault(name, {})[state] = _measure(backend, checkpoint, key)
    return {"at": checkpoint.location, **summary(checkpoint), "identity": checkpoint.identity, "weights": weights}


def _newest_readable(backend: CheckpointBackend, names: list[str]) -> Checkpoint:
    """Return the newest checkpoint with a readable manifest. Its blocks are checked when they are read."""
    for name in names[:-1]:
        try:
            return catalog.read_manifest(backend, name)
        except CheckpointError as error:
            notify(f"skipped: {error}")
    return catalog.read_manifest(backend, names[-1])


def _measure(backend: CheckpointBackend, checkpoint: Checkpoint, key: str) -> Report:
    stored = checkpoint.tensors[key]
    tensor = read_whole(backend, checkpoint, [key], check_files=False)[key]
    return {
        "shape": list(stored.shape),
        "dtype": stored.dtype,
        "norm": float(torch.linalg.vector_norm(tensor, dtype=torch.float64)),
        "largest": float(tensor.abs().max()) if tensor.numel() else 0.0,
        "not_finite": int(tensor.numel() - tensor.isfinite().sum()),
        "zero": int((tensor == 0).sum()),
    }


def show_inspected(report: Report) -> None:
    out = console()
    out.print(report["at"])
    content = f"{report['tensors']} tensors, {decimal(report['bytes'])} in {count_text(report['files'], 'file')}"
    writer = f"written {report['written']} by {report['ranks'] or 1} x {report['layout'] or 'one process'}"
    out.print(f"step {report['step']:,}, {report['samples']:,} samples read; {content}; {writer}")
    states = list(dict.fromkeys(state for weight in report["weights"].values() for state in weight if state != "master"))
    table = grid(5 + len(states))
    table.add_row("weight", "shape", "norm", "largest", *(f"{state} norm" for state in states), "")
    for name, weight in report["weights"].items():
        master = weight.get("master") or next(iter(weight.values()))
        norms = [f"{weight[state]['norm']:.4g}" if state in weight else "" for state in states]
        shape = " x ".join(map(str, master["shape"])) or "scalar"
        not_finite = sum(measures["not_finite"] for measures in weight.values())
        warning = f"{not_finite:,} not finite" if not_finite else ""
        table.add_row(name, shape, f"{master['norm']:.4g}", f"{master['largest']:.4g}", *norms, warning)
    out.print(table)
