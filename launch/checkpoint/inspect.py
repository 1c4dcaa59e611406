"""`manta checkpoint verify` and `inspect`: read checkpoints, all their bytes or tensor by tensor."""

import time
from fnmatch import fnmatchcase

import torch
from rich.filesize import decimal
from rich.table import Table

from manta.data.errors import InputError
from manta.launch.checkpoint.list_checkpoints import Report, select_checkpoints, summary
from manta.launch.inspect.charts import console
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.manifest import Checkpoint
from manta.trainer.checkpoint.reader import read_tensors
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.storage import CheckpointBackend
from manta.trainer.checkpoint.write_plan import TORCH_DTYPES


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
        rate = report["bytes"] / max(report["seconds"], 1e-9) / 1e9
        verdict = f"bad: {report['error']}" if report["error"] else f"valid: {decimal(report['bytes'])}, {rate:.1f} GB/s"
        console().print(f"{report['at']}  {verdict}")


def inspect(source: str, match: str) -> Report:
    """Raises InputError if there is no checkpoint, or no weight of such a name, and CheckpointError if what is read is damaged."""
    backend, names = select_checkpoints(source)
    checkpoint = _newest_readable(backend, names)
    keys = [key for key in checkpoint.tensors if fnmatchcase(key.partition("/")[2], match)]
    if not keys:
        some = ", ".join(list(dict.fromkeys(key.partition("/")[2] for key in checkpoint.tensors))[:3])
        raise InputError(f"--match: expected weights of {checkpoint.location}, such as {some}, got {match!r}. Try 'blocks.*'.")
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
            console().print(f"skipped: {error}")
    return catalog.read_manifest(backend, names[-1])


def _measure(backend: CheckpointBackend, checkpoint: Checkpoint, key: str) -> Report:
    stored = checkpoint.tensors[key]
    tensor = torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype])
    read_tensors(backend, checkpoint, {key: TensorViews.from_whole(tensor)}, check_files=None)
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
    content = f"{report['tensors']} tensors, {decimal(report['bytes'])} in {report['files']} files"
    writer = f"written {report['written']} by {report['ranks'] or 1} x {report['layout'] or 'one process'}"
    out.print(f"step {report['step']:,}, {report['samples']:,} samples read; {content}; {writer}")
    states = list(dict.fromkeys(state for weight in report["weights"].values() for state in weight if state != "master"))
    table = Table.grid(padding=(0, 2))
    table.add_row("weight", "shape", "norm", "largest", *(f"{state} norm" for state in states), "")
    for name, weight in report["weights"].items():
        master = weight.get("master") or next(iter(weight.values()))
        norms = [f"{weight[state]['norm']:.4g}" if state in weight else "" for state in states]
        shape = " x ".join(map(str, master["shape"])) or "scalar"
        not_finite = sum(measures["not_finite"] for measures in weight.values())
        warning = f"{not_finite:,} not finite" if not_finite else ""
        table.add_row(name, shape, f"{master['norm']:.4g}", f"{master['largest']:.4g}", *norms, warning)
    out.print(table)
