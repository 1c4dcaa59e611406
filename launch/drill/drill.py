"""Runs a config twice, once with injected faults: every fault must be detected and survived, and the losses must be the same."""

import contextlib
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import typer

from manta.cluster.protocol import ExitCode
from manta.cluster.ray.runtime import Ray
from manta.data.storage.location import join, local_path
from manta.launch.config import RunConfig
from manta.launch.drill.faults import FaultResult, FaultScript
from manta.launch.drill.monitor import RunMonitor, Script
from manta.launch.messages import notify
from manta.launch.run.preflight import RunPlan, preflight
from manta.launch.run.start import supervise
from manta.trainer.metrics import Line
from manta.trainer.run_directory import RunDirectory

DRILL_DEFAULTS = ("train.steps=100000", "checkpoint.every_steps=10", "checkpoint.keep=2", "track.every_steps=1")
"""They override the file, and the command line overrides them: the run must outlast all faults, and save often."""
FP32_TOLERANCE, TOLERANCE = 1e-5, 5e-3  # how far losses may differ after other ranks have summed in another order: in fp32, and otherwise
STOPPED = frozenset({ExitCode.INTERRUPTED, ExitCode.SAVED, ExitCode.UNSAVED})
COLUMNS = ("fault", "detected after", "resumed after", "recomputed", "losses", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Losses and samples of a part of a run, compared with those of a run without faults."""

    text: str
    is_same: bool


def drill(config: RunConfig, ray: Ray) -> int:
    """Inject all faults and print a table. Returns 0 if the run survived them all, with the same losses as without faults."""
    directory = config.run.dir.absolute().with_name(f"{config.run.dir.name}-drill-{secrets.token_hex(2)}")
    faulty, reference = (_plan(config, ray, directory.name, name) for name in ("disturbed", "undisturbed"))
    monitor, reference_monitor = RunMonitor(faulty.run_dir), RunMonitor(reference.run_dir)
    script = FaultScript(config, ray, monitor, report)
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
    comparisons = [compare(lines, reference_monitor.lines, config.precision) for lines in _by_fault(script.results, monitor.lines)]
    typer.echo(table(script.results, comparisons))
    injected = [pair for pair in zip(script.results, comparisons, strict=True) if not pair[0].skipped]
    failed = [result.fault for result, losses in injected if not (result.is_survived and losses.is_same)]
    if code or failed:
        typer.echo(f"failed: {', '.join(failed) or f'the run ended with exit code {code}'}; both runs are in {directory}")
        return ExitCode.FAILED
    _remove(directory, faulty.run_dir, reference.run_dir)
    typer.echo(f"passed: {len(injected)} faults in {monitor.furthest_step} steps")
    return ExitCode.DONE


def report(result: FaultResult) -> None:
    if result.skipped:
        notify(f"{result.fault}: skipped: {result.skipped}")
    elif result.is_survived:
        resumed = "kept running" if result.resumed is None else f"resumed after {result.resumed:.2f} s"
        notify(f"{result.fault}: detected after {result.detected:.2f} s, {resumed}")
    else:
        notify(f"{result.fault}: NOT DETECTED")


def compare(lines: Sequence[Line], reference: Sequence[Line], precision: str) -> Comparison:
    """Compare a part of a run with a run without faults. Fewer ranks sum in another order: losses may differ by rounding."""
    by_step = {line["step"]: line for line in reference}
    pairs = [(line, by_step[line["step"]]) for line in lines if line["step"] in by_step]
    if not pairs:
        return Comparison(text="nothing to compare", is_same=False)
    if any(line["data/digest"] != other["data/digest"] for line, other in pairs):
        return Comparison(text="DIFFERENT SAMPLES", is_same=False)
    difference = max(abs(line["train/loss"] - other["train/loss"]) for line, other in pairs)
    if difference == 0:
        return Comparison(text="bitwise the same", is_same=True)
    is_same = difference <= (FP32_TOLERANCE if precision == "fp32" else TOLERANCE)
    return Comparison(text=f"the same within {difference:.0e}" if is_same else f"DIFFER BY {difference:.0e}", is_same=is_same)


def table(results: Sequence[FaultResult], comparisons: Sequence[Comparison]) -> str:
    """Return a line per fault, in columns."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for result, losses in zip(results, comparisons, strict=True):
        if result.skipped:
            rows.append((result.fault, "skipped", "", "", "", result.skipped))
            continue
        resumed = "kept running" if result.keeps_running else _seconds(result.resumed)
        recomputed = f"{result.recomputed} step{'s' if result.recomputed > 1 else ''}" if result.recomputed else ""
        rows.append((result.fault, _seconds(result.detected), resumed, recomputed, losses.text, result.note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _seconds(value: float | None) -> str:
    return "NEVER" if value is None else f"{value:.2f} s"


def _plan(config: RunConfig, ray: Ray, drill_name: str, run_name: str) -> RunPlan:
    """Plan a run beside the one that the config names, which stays untouched."""
    run = config.run.model_copy(update={"dir": config.run.dir.absolute().with_name(drill_name) / run_name})
    directory = config.checkpoint.directory
    if directory is not None:
        directory = join(directory, f"{drill_name}/{run_name}")
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


def _by_fault(results: Sequence[FaultResult], lines: Sequence[Line]) -> list[Sequence[Line]]:
    """Return the lines logged from each fault until the next."""
    bounds = [*(result.first_line for result in results if not result.skipped), len(lines)]
    parts = iter(lines[start:end] for start, end in pairwise(bounds))
    return [() if result.skipped else next(parts) for result in results]


def _remove(directory: Path, *runs: RunDirectory) -> None:
    for checkpoints in [run.open_checkpoints() for run in runs]:
        for name in [*checkpoints.names(), *checkpoints.bad()]:
            checkpoints.delete(name)
        if (path := local_path(str(checkpoints))) is not None:
            shutil.rmtree(path.parent, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)
