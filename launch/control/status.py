"""`manta status`: the state of a run, read from its directory alone."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from manta.cluster.protocol import ExitCode
from manta.cluster.supervise.event_log import read_events
from manta.data.errors import InputError
from manta.data.sampling.step_samples import Timeline
from manta.launch.messages import count_text
from manta.trainer.metrics import Line, format_duration, format_loss, loss_terms, read_metrics
from manta.trainer.run_directory import RunDirectory

STATES = {
    ExitCode.DONE: "done",
    ExitCode.SAVED: "stopped, saved",
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.UNSAVED: "stopped, not saved",
}
KILLED = "killed"
NONE = "none yet"


def status(directory: Path) -> dict[str, Any]:
    """Return the state as JSON has it. Raises InputError if the directory has no run."""
    run_dir = RunDirectory(directory.absolute())
    if not run_dir.events_file.exists():
        remedy = f"Start a run: manta train FILE run.dir={directory}"
        raise InputError(f"{directory}: expected a run directory, got no {run_dir.events_file.name}. {remedy}")
    events = read_events(run_dir.events_file)
    lines = read_metrics(run_dir.metrics_file)
    newest = lines[-1] if lines else {}
    config = run_dir.config()
    steps, timeline = config.train.steps, config.timeline()
    evaluated = [line for line in lines if "eval/loss" in line]
    checkpoints = run_dir.open_checkpoints().names()
    return {
        "run": str(run_dir.path),
        "state": _state(run_dir, events),
        "step": newest.get("step", 0),
        "steps": steps,
        "train_loss": newest.get("train/loss"),
        "eval_loss": evaluated[-1]["eval/loss"] if evaluated else None,
        "eval_step": evaluated[-1]["step"] if evaluated else None,
        "train_terms": loss_terms(newest, "train"),
        "eval_terms": loss_terms(evaluated[-1], "eval") if evaluated else {},
        "skipped": sum(line.get("skipped", False) for line in lines),
        "loss_scale": newest.get("loss_scale"),
        "tokens": newest.get("tokens", 0),
        "global_batch": newest.get("global_batch"),
        "sequence_length": newest.get("sequence_length"),
        "tokens_per_second": newest.get("tokens_per_second"),
        "seconds_left": _seconds_left(newest, timeline, steps) if newest else None,
        "world_size": newest.get("world_size"),
        "layout": newest.get("layout"),
        "attempts": max((event["attempt"] for event in events), default=0),
        "failures": [event["message"] for event in events if event["event"] in {"rank-failed", "node-lost"}],
        "checkpoint": checkpoints[0] if checkpoints else None,
    }


def print_status(status: dict[str, Any]) -> None:
    """Print the state as a table."""
    is_running, left = status["state"] == "running", status["seconds_left"]
    hint = f"; resume with: manta resume {RunDirectory(Path(status['run'])).quoted}" if status["state"] == KILLED else ""
    rows = {
        "run": status["run"],
        "state": status["state"] + hint,
        "step": f"{status['step']} of {status['steps']}" + (f", {format_duration(left)} left" if left and is_running else ""),
        "loss": NONE if status["train_loss"] is None else format_loss(status["train_loss"], status["train_terms"]),
        "validation": NONE,
        "speed": NONE,
        "batch": NONE,
        "layout": status["layout"] or NONE,
        "attempts": f"{status['attempts']}" + (f"; last failure: {status['failures'][-1]}" if status["failures"] else ""),
        "checkpoint": status["checkpoint"] or NONE,
    }
    if status["eval_loss"] is not None:
        rows["validation"] = f"{format_loss(status['eval_loss'], status['eval_terms'])} at step {status['eval_step']}"
    if status["step"]:
        rows["speed"] = f"{status['tokens_per_second']:,.0f} tokens/s on {count_text(status['world_size'], 'rank')}"
        rows["batch"] = f"{status['global_batch']} samples, in sequences of {status['sequence_length']} tokens"
    if status["skipped"]:
        rows["skipped"] = f"{count_text(status['skipped'], 'step')} with gradient overflow; the loss scale is now {status['loss_scale']:g}"
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


def _state(run_dir: RunDirectory, events: list[dict[str, Any]]) -> str:
    if run_dir.is_locked:
        return "running"
    last = next((event for event in reversed(events) if event["event"] in {"run-started", "run-ended"}), None)
    return KILLED if last is None or last["event"] == "run-started" else STATES.get(last["exit_code"], "failed")


def _seconds_left(newest: Line, timeline: Timeline, steps: int) -> float:
    """Estimate from the newest step's time per sample: later steps may have other batch sizes."""
    step = newest["step"]
    seconds_per_sample = newest["step_time"] / timeline.stage(step - 1).global_batch
    return seconds_per_sample * (timeline.first_sample(steps) - timeline.first_sample(step))
