"""`manta checkpoint inspect`: what a checkpoint holds, tensor by tensor."""

from fnmatch import fnmatchcase
from typing import Any

import torch
from rich.table import Table

from manta.data.errors import InputError
from manta.launch.checkpoint.list import facts, found, size
from manta.launch.inspect.charts import console
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.backend import CheckpointBackend
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.manifest import Checkpoint
from manta.trainer.checkpoint.reader import read_tensors
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.write_plan import TORCH_DTYPES

Told = dict[str, Any]


def inspect(where: str, match: str) -> Told:
    """Raises InputError if there is no checkpoint, or no weight of such a name, and CheckpointError if what is read is damaged."""
    place, names = found(where)
    checkpoint = _newest(place, names)
    keys = [key for key in checkpoint.tensors if fnmatchcase(key.partition("/")[2], match)]
    if not keys:
        some = ", ".join(list(dict.fromkeys(key.partition("/")[2] for key in checkpoint.tensors))[:3])
        raise InputError(f"--match: got {match!r}, which no weight of {checkpoint.location} matches; there are {some}, …; try 'blocks.*'")
    weights: dict[str, Told] = {}
    for key in keys:
        state, _, name = key.partition("/")
        weights.setdefault(name, {})[state] = _measured(place, checkpoint, key)
    return {"at": checkpoint.location, **facts(checkpoint), "identity": checkpoint.identity, "weights": weights}


def _newest(place: CheckpointBackend, names: list[str]) -> Checkpoint:
    """The newest whose manifest can be read; what of its files is read is checked as it is."""
    for name in names:
        try:
            return catalog.read_manifest(place, name)
        except CheckpointError as error:
            if name == names[-1]:
                raise
            console().print(f"passed over: {error}", soft_wrap=True)
    raise AssertionError("there is at least one name")


def _measured(place: CheckpointBackend, checkpoint: Checkpoint, key: str) -> Told:
    stored = checkpoint.tensors[key]
    tensor = torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype])
    read_tensors(place, checkpoint, {key: TensorViews.from_whole(tensor)}, check_files=None)
    finite = tensor.isfinite()
    return {
        "shape": list(stored.shape),
        "dtype": stored.dtype,
        "norm": float(torch.linalg.vector_norm(tensor, dtype=torch.float64)),
        "largest": float(tensor.abs().max()) if tensor.numel() else 0.0,
        "not_finite": int(tensor.numel() - finite.sum()),
        "zero": int((tensor == 0).sum()),
    }


def show(told: Told) -> None:
    out = console()
    out.print(told["at"], soft_wrap=True)
    held = f"{told['tensors']} tensors, {size(told['bytes'])} in {told['files']} files"
    by = f"written {told['written']} by {told['ranks'] or 1} x {told['layout'] or 'one process'}"
    out.print(f"step {told['step']:,}, {told['samples']:,} samples read; {held}; {by}", soft_wrap=True)
    states = list(dict.fromkeys(state for weight in told["weights"].values() for state in weight))
    table = Table.grid(padding=(0, 2))
    table.add_row("weight", "shape", "norm", "largest", *(f"{state} norm" for state in states if state != "master"), "")
    for name, weight in told["weights"].items():
        first = next(iter(weight.values()))
        shown = weight.get("master", first)
        others = [f"{weight[state]['norm']:.4g}" if state in weight else "" for state in states if state != "master"]
        strange = sum(one["not_finite"] for one in weight.values())
        shape = " x ".join(map(str, shown["shape"])) or "one number"
        table.add_row(name, shape, f"{shown['norm']:.4g}", f"{shown['largest']:.4g}", *others, f"{strange:,} not finite" if strange else "")
    out.print(table)
