"""`manta checkpoint verify`: every byte of a run's checkpoints read."""

import time
from typing import Any

from manta.launch.checkpoint.list import found, size
from manta.launch.inspect.charts import console
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.errors import CheckpointError

Told = dict[str, Any]


def verify(where: str) -> list[Told]:
    """Of each checkpoint what is wrong with it, if anything is."""
    place, names = found(where)
    told: list[Told] = []
    for name in names:
        begun = time.perf_counter()
        error, count = None, 0
        try:
            count = catalog.verify(place, name).bytes
        except CheckpointError as damaged:
            error = str(damaged)
        told.append({"at": place.location(name), "bytes": count, "seconds": time.perf_counter() - begun, "error": error})
    return told


def show(told: list[Told]) -> None:
    out = console()
    for one in told:
        rate = one["bytes"] / max(one["seconds"], 1e-9) / 1e9
        verdict = f"bad: {one['error']}" if one["error"] else f"whole: {size(one['bytes'])}, {rate:.1f} GB/s"
        out.print(f"{one['at']}  {verdict}", soft_wrap=True)
