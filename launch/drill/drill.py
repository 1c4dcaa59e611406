"""Runs a config twice, once with injected faults: every fault must be detected and survived, and the losses must be the same."""

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
from manta.launch.drill.faults import FaultResult, FaultScript, RunMonitor, Script
from manta.launch.run.preflight import RunPlan, preflight
from manta.launch.run.start import supervise
from manta.launch.terminal import notify
from manta.launch.track.commands import NO_ALERTS, NO_TRACKERS
from manta.trainer.metrics import Line
from manta.trainer.run_directory import RunDirectory

DRILL_DEFAULTS = ("train.steps=100000", "checkpoint.every_steps=10", "checkpoint.keep=2", "track.every_steps=1", *NO_ALERTS, *NO_TRACKERS)
"""They override the file, and the command line overrides them: the run must outlast all faults, and save often."""
FP32_TOLERANCE, TOLERANCE = 1e-5, 5e-3  # how far losses may differ after other ranks have summed in another order: in fp32, and otherwise
STOPPED = frozenset({ExitCode.INTERRUPTED, ExitCode.SAVED, ExitCode.UNSAVED})
COLUMNS = ("fault", "detected after", "resumed after", "recomputed", "losses", "")


def drill(config: RunConfig, ray: Ray) -> int:
    """Inject all faults and print a table. Returns 0 if the run survived them all, with the same losses as without faults."""
    directory = config.run.dir.absolute().with_name(f"{config.run.dir.name}-drill-{secrets.token_hex(2)}")
    faulty, reference = (_plan(config, ray, directory.name, name) for name in ("disturbed", "undisturbed"))
    monitor, reference_monitor = RunMonitor(faulty.run_dir), RunMonitor(reference.run_dir)
    script = FaultScript(config, ray, monitor)
    try:
        code = _run(faulty, ray, monitor, script.run())
        if code not in STOPPED:
            notify(f"running without faults to step {monitor.furthest_step}, to compare losses")
            code = _run(reference, ray, reference_monitor, _until_step(reference_monitor, monitor.furthest_step)) or code
    except TimeoutError:
        code = ExitCode.FAILED
        notify(f"{faulty.run_dir.path}: no progress; {faulty.run_dir.logs} may say why")
    if code in STOPPED:
        notify(f"interrupted; both runs are in {directory}")
        return code
    injected = [result for result in script.results if not result.skipped]
    bounds = pairwise([*(result.first_line for result in injected), len(monitor.lines)])
    for result, (start, end) in zip(injected, bounds, strict=True):  # the lines logged from each fault until the next
        result.losses, result.has_same_losses = compare(monitor.lines[start:end], reference_monitor.lines, config.precision)
    typer.echo(table(script.results))
    survived = [result.detected is not None and (result.keeps_running or result.resumed is not None) for result in injected]
    failed = [result.fault for result, is_survived in zip(injected, survived, strict=True) if not (is_survived and result.has_same_losses)]
    if code or failed:
        typer.echo(f"failed: {', '.join(failed) or f'the run ended with exit code {code}'}; both runs are in {directory}")
        return ExitCode.FAILED
    _remove(directory, faulty.run_dir, reference.run_dir)
    typer.echo(f"passed: {len(injected)} faults in {monitor.furthest_step} steps")
    return ExitCode.DONE


def compare(lines: Sequence[Line], reference: Sequence[Line], precision: str) -> tuple[str, bool]:
    """Describe how a part of a run differs from a run without faults, and return whether it counts as the same.

    Fewer ranks sum in another order: losses may differ by rounding.
    """
    by_step = {line["step"]: line for line in reference}
    pairs = [(line, by_step[line["step"]]) for line in lines if line["step"] in by_step]
    if not pairs:
        return "nothing to compare", False
    if any(line["data/digest"] != other["data/digest"] for line, other in pairs):
        return "DIFFERENT SAMPLES", False
    difference = max(abs(line["train/loss"] - other["train/loss"]) for line, other in pairs)
    if difference == 0:
        return "bitwise the same", True
    is_same = difference <= (FP32_TOLERANCE if precision == "fp32" else TOLERANCE)
    return f"the same within {difference:.0e}" if is_same else f"DIFFER BY {difference:.0e}", is_same


def table(results: Sequence[FaultResult]) -> str:
    """Return a line per fault, in columns."""
    rows = [COLUMNS, *(result.cells() for result in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _plan(config: RunConfig, ray: Ray, drill_name: str, run_name: str) -> RunPlan:
    """Plan a run beside the one that the config names, which stays untouched."""
    run = config.run.model_copy(update={"dir": config.run.dir.absolute().with_name(drill_name) / run_name})
    shared = config.checkpoint.directory
    directory = None if shared is None else join(shared, f"{drill_name}/{run_name}")
    checkpoint = config.checkpoint.model_copy(update={"directory": directory})
    plan = preflight(config.model_copy(update={"run": run, "checkpoint": checkpoint}), ray)
    assert plan is not None  # its directory is new
    return plan


def _run(plan: RunPlan, ray: Ray, monitor: RunMonitor, script: Script[None]) -> int:
    """Start a run, and end it once the script has ended. Returns 0 then, or the run's exit code if the run ended first."""
    with supervise(plan, ray) as controller, contextlib.closing(controller.run()) as events, contextlib.suppress(StopIteration):
        next(script)
        for event in events:
            monitor.add(event)
            if event.kind == "run-ended":
                return int(event.details["exit_code"]) or ExitCode.FAILED
            next(script)
    return ExitCode.DONE


def _until_step(monitor: RunMonitor, step: int) -> Script[None]:
    while monitor.step < step:
        yield


def _remove(directory: Path, *runs: RunDirectory) -> None:
    for checkpoints in [run.open_checkpoints() for run in runs]:
        for name in [*checkpoints.names(), *checkpoints.bad()]:
            checkpoints.delete(name)
        if (path := local_path(str(checkpoints))) is not None:
            shutil.rmtree(path.parent, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)
