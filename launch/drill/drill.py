"""Two runs of one config: faults are done to the one, nobody disturbs the other, and what they have learned must be the same."""

import contextlib
import secrets
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import typer

from manta.cluster.protocol import ExitCode
from manta.cluster.ray.runtime import Ray
from manta.data.storage.location import join, local_path
from manta.launch.config import RunConfig
from manta.launch.drill.faults import Faults, Row
from manta.launch.drill.watch import Wait, Watch
from manta.launch.run.display import say
from manta.launch.run.train import Ready, ready_to_train
from manta.trainer.metrics import Line
from manta.trainer.run_directory import RunDirectory

LAID_UNDER = ("train.steps=100000", "checkpoint.every_steps=10", "checkpoint.keep=2", "track.every_steps=1")
"""Over the file, and under what the command line says: a run that does not end before all faults were done, and saves often."""
ALIKE, ROUNDED = 1e-5, 5e-3  # how far losses may lie apart after other ranks have added up in another order: in fp32, and else
STOPPED = frozenset({ExitCode.INTERRUPTED, ExitCode.SAVED, ExitCode.UNSAVED})
COLUMNS = ("fault", "noticed", "went on", "done again", "losses", "")


def drill(config: RunConfig, ray: Ray) -> int:
    """Gives the exit code: 0 where every fault was noticed and come through, and no loss is another than without. Prints a table."""
    place = config.run.dir.absolute().with_name(f"{config.run.dir.name}-drill-{secrets.token_hex(2)}")
    disturbed, undisturbed = (_ready(config, ray, place.name, which) for which in ("disturbed", "undisturbed"))
    watch, reference = Watch(disturbed.home), Watch(undisturbed.home)
    faults = Faults(config, ray, watch, tell)
    try:
        ended = _follow(disturbed, watch, faults.script())
        if ended not in STOPPED:
            say(f"the same without a fault, to step {watch.furthest}: what is learned must be the same")
            ended = _follow(undisturbed, reference, _until(reference, watch.furthest)) or ended
    except TimeoutError:
        ended = ExitCode.FAILED
        say(f"{disturbed.home.path}: stands still; {disturbed.home.logs} may say why")
    if ended in STOPPED:
        say(f"broken off; what was done lies in {place}")
        return ended
    verdicts = [compare(lines, reference.lines, config.precision) for lines in _by_fault(faults.rows, watch.lines)]
    typer.echo(table(faults.rows, [told for told, _ in verdicts]))
    done = [(row, is_same) for row, (_, is_same) in zip(faults.rows, verdicts, strict=True) if not row.left_out]
    failed = [row.fault for row, is_same in done if not (row.is_come_through and is_same)]
    if ended or failed:
        typer.echo(f"failed: {', '.join(failed) or f'the run ended with exit code {ended}'}; both runs lie in {place}")
        return ExitCode.FAILED
    _remove(place, disturbed.home, undisturbed.home)
    typer.echo(f"passed: {len(done)} faults in {watch.furthest} steps")
    return 0


def tell(row: Row) -> None:
    """As it is known."""
    if row.left_out:
        say(f"{row.fault}: not done: {row.left_out}")
    elif row.is_come_through:
        went_on = f", went on after {row.recovered:.2f} s" if row.recovered is not None else ", went on"
        say(f"{row.fault}: noticed after {row.noticed:.2f} s{went_on}")
    else:
        say(f"{row.fault}: NOT NOTICED")


def compare(lines: Sequence[Line], undisturbed: Sequence[Line], precision: str) -> tuple[str, bool]:
    """What a part of a run has read and learned, against a run without a fault: in words, and whether it is the same.

    Ranks that became fewer add up in another order: losses may then lie apart by what rounding does.
    """
    there = {line["step"]: line for line in undisturbed}
    pairs = [(line, there[line["step"]]) for line in lines if line["step"] in there]
    if not pairs:
        return "nothing to compare", False
    if any(line["data/digest"] != other["data/digest"] for line, other in pairs):
        return "OTHER SAMPLES", False
    apart = max(abs(line["train/loss"] - other["train/loss"]) for line, other in pairs)
    if apart == 0:
        return "the same, bit by bit", True
    bound = ALIKE if precision == "fp32" else ROUNDED
    return (f"the same within {apart:.0e}", True) if apart <= bound else (f"OTHER, BY {apart:.0e}", False)


def table(rows: Sequence[Row], losses: Sequence[str]) -> str:
    """A line a fault, in columns."""
    cells: list[tuple[str, ...]] = [COLUMNS]
    for row, told in zip(rows, losses, strict=True):
        again = f"{row.again} step{'s' if row.again > 1 else ''}" if row.again else ""
        done = (_seconds(row.noticed), "at once" if row.stays_up else _seconds(row.recovered), again, told, row.note)
        cells.append((row.fault, *(("not done", "", "", "", row.left_out) if row.left_out else done)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def _seconds(value: float | None) -> str:
    return "NEVER" if value is None else f"{value:.2f} s"


def _ready(config: RunConfig, ray: Ray, name: str, which: str) -> Ready:
    """A run beside the one that the config names, which stays untouched."""
    run = config.run.model_copy(update={"dir": config.run.dir.absolute().with_name(name) / which})
    where = config.checkpoint.directory
    if where is not None:
        where = join(where, f"{name}/{which}")
    checkpoint = config.checkpoint.model_copy(update={"directory": where})
    ready = ready_to_train(config.model_copy(update={"run": run, "checkpoint": checkpoint}), ray)
    assert ready is not None  # nobody has been there
    return ready


def _follow(ready: Ready, watch: Watch, script: Wait[None]) -> int:
    """Starts a run, and ends it once the script is at its end. Gives 0 then; the run's exit code where that ended sooner."""
    with ready.begun() as controller, contextlib.closing(controller.run()) as events, contextlib.suppress(StopIteration):
        next(script)
        for event in events:
            watch.take(event)
            if event.kind == "run-ended":
                return int(event.details["exit_code"]) or ExitCode.FAILED
            next(script)
    return 0


def _until(watch: Watch, step: int) -> Wait[None]:
    while watch.step < step:
        yield


def _by_fault(rows: Sequence[Row], lines: Sequence[Line]) -> list[Sequence[Line]]:
    """What was written from each fault on, until the next."""
    ends = [*(row.begun for row in rows if not row.left_out), len(lines)]
    parts = iter(lines[begun:end] for begun, end in pairwise(ends))
    return [() if row.left_out else next(parts) for row in rows]


def _remove(place: Path, *homes: RunDirectory) -> None:
    for checkpoints in [home.checkpoints for home in homes]:
        for name in [*checkpoints.names(), *checkpoints.bad()]:
            checkpoints.delete(name)
        if (directory := local_path(str(checkpoints))) is not None:
            shutil.rmtree(directory.parent, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)
