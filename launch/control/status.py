"""`manta status`: the state of a run, read from its directory alone."""

import time
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from rich.table import Table

from manta.cluster.protocol import ExitCode
from manta.cluster.supervise.event_log import exit_code, read_events
from manta.cluster.supervise.failure import Cause
from manta.cluster.supervise.rank_list import read_ranks
from manta.launch.config import no_run
from manta.launch.goodput import goodput
from manta.launch.inspect.charts import console, grid, percent
from manta.launch.terminal import count_text, notify
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.metrics import format_duration, format_loss, loss_terms, read_all_metrics, valid_lines
from manta.trainer.run_directory import RunDirectory

STATES: dict[int | None, str] = {
    ExitCode.DONE: "done",
    ExitCode.SAVED: "stopped, saved",
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.UNSAVED: "stopped, not saved",
    None: "killed",
}
"""By the exit code of a run; any other is a failure."""
EXITS: dict[int | None, str] = {
    ExitCode.DONE: "done",
    ExitCode.USAGE: "usage",
    ExitCode.SAVED: "stopped",
    ExitCode.INTERRUPTED: "stopped",
    ExitCode.UNSAVED: "stopped",
    None: "killed",
}
"""By the exit code of a run, for programs; any other is "failed". These words never change."""
RUNNING = "running"
NONE = "none yet"
Event = dict[str, Any]


def status(directory: Path) -> dict[str, Any]:
    """Return the state as JSON has it. Raises InputError if the directory has no run."""
    run_dir = RunDirectory(directory.absolute())
    run_dir.check()
    if not run_dir.events_file.exists():
        raise no_run(directory, run_dir.events_file.name)
    events, all_lines = read_events(run_dir.events_file), read_all_metrics(run_dir.metrics_file)
    lines = valid_lines(all_lines)
    config = run_dir.config()
    newest = lines[-1] if lines else {}
    evaluated = next((line for line in reversed(lines) if "eval/loss" in line), {})
    step, steps, timeline = newest.get("step", 0), config.train.steps, config.timeline()
    code, is_running = exit_code(events), run_dir.is_locked
    ended: dict[str, Any] = {} if is_running else {"exit_code": code, "exit_reason": exit_reason(events)}
    ended |= {"exit": RUNNING if is_running else EXITS.get(code, "failed"), "cause": None if is_running else exit_cause(events)}
    if newest and is_running:  # later steps may have other batch sizes
        seconds_per_sample = newest["step_time"] / timeline.stage(step - 1).global_batch
        ended |= {"seconds_left": seconds_per_sample * (timeline.first_sample(steps) - timeline.first_sample(step))}
    spent = goodput(events, all_lines, now=time.time() if is_running else None)
    copied = ("loss_scale", "global_batch", "sequence_length", "tokens_per_second", "mfu", "memory/peak", "world_size", "layout")
    return {
        "run": str(run_dir.path),
        "state": RUNNING if is_running else STATES.get(code, "failed"),
        "step": step,
        "steps": steps,
        "train_loss": newest.get("train/loss"),
        "eval_loss": evaluated.get("eval/loss"),
        "eval_step": evaluated.get("step"),
        "train_terms": loss_terms(newest, "train"),
        "eval_terms": loss_terms(evaluated, "eval"),
        "skipped": sum(line.get("skipped", False) for line in lines),
        "tokens": newest.get("tokens", 0),
        **ended,
        "attempts": max((event["attempt"] for event in events), default=0),
        "failures": [event["message"] for event in events if event["event"] in {"rank-failed", "node-lost"}],
        "checkpoint": _newest_checkpoint(run_dir),
        "goodput": round(spent.share, 5),
        "seconds": round(spent.total, 3),
        **{key.replace("/", "_"): newest.get(key) for key in copied},
        "ranks": [rank.model_dump() for rank in read_ranks(run_dir.path)] if is_running else [],
    }


def _newest_checkpoint(run_dir: RunDirectory) -> str | None:
    try:
        return next(iter(run_dir.open_checkpoints().names()), None)
    except CheckpointError as error:  # others may see how far a run is, and not read its weights
        notify(str(error))
        return None


def exit_reason(events: Sequence[Event]) -> str:
    """Return why the last start of a run that does not run has ended."""
    code = exit_code(events)
    if code in {None, ExitCode.DONE}:
        return STATES[code]
    for event in reversed(events):
        match event:
            case {"event": "run-started"}:
                break
            case {"event": "decided", "reason": str(reason)} | {"event": "rank-failed" | "node-lost", "message": str(reason)}:
                return reason
            case {"event": "leaving", "signal": str(name)}:
                return f"stop requested by {name}"
            case _:
                pass
    return STATES.get(code, "failed")


def exit_cause(events: Sequence[Event]) -> str | None:
    """Return the name of the Cause of the failure that ended the last start; None if it did not fail, or before a rank was started."""
    if EXITS.get(exit_code(events), "failed") not in {"failed", "usage"}:
        return None
    for event in reversed(events):
        match event:
            case {"event": "run-started"}:
                break
            case {"event": "rank-failed", "cause": str(name)}:
                return Cause[name].name  # older event logs have other names
            case {"event": "node-lost"}:
                return (Cause.PREEMPTED if event.get("announced") else Cause.NODE_LOST).name
            case {"event": "node-unfit"}:
                return Cause.INPUT.name
            case _:
                pass
    return None


def status_code(status: dict[str, Any]) -> int:
    """Return the exit code of `manta status --exit-code`: the run's own, if it has ended."""
    if status["state"] == RUNNING:
        return ExitCode.RUNNING
    return ExitCode.KILLED if status["exit_code"] is None else status["exit_code"]


def print_status(status: dict[str, Any]) -> None:
    """Print the state as a table."""
    console().print(status_table(status))


def status_table(status: dict[str, Any]) -> Table:
    """Return the state as a table of names and values."""
    left = status.get("seconds_left")
    is_resumable = status["state"] not in {RUNNING, STATES[ExitCode.DONE]}
    hint = f"; resume with: manta resume {RunDirectory(Path(status['run'])).quoted}" if is_resumable else ""
    rows = {
        "run": status["run"],
        "state": status["state"] + hint,
        "step": f"{status['step']} of {status['steps']}" + (f", {format_duration(left)} left" if left else ""),
        "loss": NONE if status["train_loss"] is None else format_loss(status["train_loss"], status["train_terms"]),
        "validation": NONE,
        "speed": NONE,
        "batch": NONE,
        "layout": status["layout"] or NONE,
        "attempts": f"{status['attempts']}" + (f"; last failure: {shorten(status['failures'][-1], 300)}" if status["failures"] else ""),
        "checkpoint": status["checkpoint"] or NONE,
        "goodput": f"{percent(status['goodput'])} of {format_duration(status['seconds'])} since the first start",
    }
    if status["eval_loss"] is not None:
        rows["validation"] = f"{format_loss(status['eval_loss'], status['eval_terms'])} at step {status['eval_step']}"
    if status["step"]:
        rows["speed"] = f"{status['tokens_per_second']:,.0f} tokens/s on {count_text(status['world_size'], 'rank')}"
        rows["batch"] = f"{count_text(status['global_batch'], 'sample')}, in sequences of {status['sequence_length']} tokens"
    if isinstance(status["mfu"], float):
        rows["speed"] += f", MFU {percent(status['mfu'])}"
    if isinstance(status["memory_peak"], int) and 0 < status["memory_peak"] < 1 << 63:
        rows["memory"] = f"{status['memory_peak'] / 1e9:,.2f} GB at most, on rank 0"
    if status["skipped"]:
        rows["skipped"] = f"{count_text(status['skipped'], 'step')} with gradient overflow; the loss scale is now {status['loss_scale']:g}"
    table = grid(2)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
