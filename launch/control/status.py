"""How a run stands, read from its directory alone."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from manta.cluster.protocol import ExitCode
from manta.cluster.supervise.event_log import read_events
from manta.data.errors import InputError
from manta.data.sampling.timeline import Timeline
from manta.launch.run.train import ranks_in_words
from manta.trainer.metrics import Line, format_duration, format_loss, loss_terms, read_metrics
from manta.trainer.run_directory import RunDirectory

ENDS = {
    ExitCode.DONE: "done",
    ExitCode.SAVED: "stopped, saved",
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.UNSAVED: "stopped, not saved",
}


def status(directory: Path) -> dict[str, Any]:
    """What programs and people want to know. Raises InputError where there is no run."""
    home = RunDirectory(directory.absolute())
    if not home.events_file.exists():
        raise InputError(
            f"{directory}: got no {home.events_file.name}, wants a run directory; start one with: manta train FILE run.dir={directory}"
        )
    events = read_events(home.events_file)
    lines = read_metrics(home.metrics_file)
    newest = lines[-1] if lines else {}
    config = home.config()
    steps, timeline = config.train.steps, config.timeline()
    evaluated = [line for line in lines if "eval/loss" in line]
    checkpoints = home.open_checkpoints().names()
    done = newest.get("step", 0)
    return {
        "run": str(home.path),
        "state": _state(home, events),
        "step": done,
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


def show(told: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    left = told["seconds_left"]
    rows = {
        "run": told["run"],
        "state": told["state"],
        "step": f"{told['step']} of {told['steps']}" + (f", {format_duration(left)} left" if left and told["state"] == "running" else ""),
        "loss": "none yet" if told["train_loss"] is None else format_loss(told["train_loss"], told["train_terms"]),
        "validation": _validation(told),
        "speed": f"{told['tokens_per_second']:,.0f} tokens/s on {ranks_in_words(told['world_size'])}" if told["step"] else "none yet",
        "batch": f"{told['global_batch']} samples, in sequences of {told['sequence_length']} tokens"
        if told["global_batch"]
        else "none yet",
        "layout": told["layout"] or "none yet",
        "attempts": f"{told['attempts']}" + (f"; the last failure: {told['failures'][-1]}" if told["failures"] else ""),
        "checkpoint": told["checkpoint"] or "none yet",
    }
    if told["skipped"]:
        rows["skipped"] = f"{told['skipped']} steps whose gradients overflowed; the loss scale is now {told['loss_scale']:g}"
    for name, value in rows.items():
        table.add_row(name, value)
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


def _state(home: RunDirectory, events: list[dict[str, Any]]) -> str:
    if home.is_locked:
        return "running"
    ended = [event for event in events if event["event"] in {"run-started", "run-ended"}][-1:]
    if not ended or ended[0]["event"] == "run-started":
        return f"broken off; go on with: manta resume {home.quoted}"
    return ENDS.get(ended[0]["exit_code"], "failed")


def _seconds_left(newest: Line, timeline: Timeline, steps: int) -> float:
    """At the pace of the newest step, however many samples the steps to come have."""
    done = newest["step"]
    return newest["step_time"] / timeline.stage(done - 1).global_batch * (timeline.first_sample(steps) - timeline.first_sample(done))


def _validation(told: dict[str, Any]) -> str:
    if told["eval_loss"] is None:
        return "none yet"
    return f"{format_loss(told['eval_loss'], told['eval_terms'])} at step {told['eval_step']}"
