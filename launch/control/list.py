"""`manta list`: all runs below a directory."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Column

from manta.data.errors import DataError, InputError
from manta.launch.control.status import status
from manta.launch.inspect.charts import console, plain_table

UNREADABLE = "unreadable"


def list_runs(directory: Path) -> list[dict[str, Any]]:
    """Return what `manta status` knows of each run below a directory, sorted by path, and how many bytes it takes on disk.

    A run that cannot be read has the state "unreadable", and the reason. Raises InputError if there is no such directory.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: expected a directory of runs, got none. Name one that exists.")
    return [_describe(run) for run in find_runs(directory)]


def find_runs(directory: Path) -> Iterator[Path]:
    """Yield the run directories below a directory, or itself. Hidden folders, links and what a run contains are not entered."""
    for folder, children, files in os.walk(directory):
        children.sort()
        if {"config.yaml", "events.jsonl"} <= set(files):
            children.clear()
            yield Path(folder)
        children[:] = [child for child in children if not child.startswith(".")]


def _describe(path: Path) -> dict[str, Any]:
    size = _bytes_on_disk(path)
    try:
        found = status(path)
        del found["ranks"]  # of many runs, they would be most of it
        return found | {"run": str(path), "bytes": size}
    except (InputError, DataError, OSError) as error:
        return {"run": str(path), "state": UNREADABLE, "exit_reason": str(error), "bytes": size}


def _bytes_on_disk(path: Path) -> int:
    """Return the bytes that a directory's files take. A file with several names counts once; what cannot be read counts as nothing."""
    seen = dict[tuple[int, int], int]()
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                found = Path(folder, name).lstat()
            except OSError:
                continue
            seen[found.st_dev, found.st_ino] = 512 * found.st_blocks
    return sum(seen.values())


def print_runs(runs: list[dict[str, Any]]) -> None:
    """Print a line for each run; the newest loss and speed are those of its last step."""
    table = plain_table(Column("run", overflow="fold"), Column("state"), "step", "loss", "validation", "tokens/s", "on disk")
    for run in runs:
        table.add_row(
            run["run"],
            run["state"],
            f"{run['step']:,} of {run['steps']:,}" if "step" in run else "",
            *(_number(run.get(key), form) for key, form in (("train_loss", ".4f"), ("eval_loss", ".4f"), ("tokens_per_second", ",.0f"))),
            f"{run['bytes'] / 1e6:,.1f} MB",
        )
    out = console()
    out.print(table)
    for run in runs:
        if run["state"] == UNREADABLE:
            out.print(run["exit_reason"])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
