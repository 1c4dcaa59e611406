"""`manta checkpoint verify`: read every byte of a run's checkpoints."""

import time

from manta.launch.checkpoint.list_checkpoints import Report, format_size, select_checkpoints
from manta.launch.inspect.charts import console
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.errors import CheckpointError


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


def show(reports: list[Report]) -> None:
    out = console()
    for report in reports:
        rate = report["bytes"] / max(report["seconds"], 1e-9) / 1e9
        verdict = f"bad: {report['error']}" if report["error"] else f"valid: {format_size(report['bytes'])}, {rate:.1f} GB/s"
        out.print(f"{report['at']}  {verdict}", soft_wrap=True)
