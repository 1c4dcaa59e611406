"""What the user sees of a run on standard output: a progress bar on a terminal, a line per interval elsewhere, and every transition."""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from manta.cluster.line_file import NO_ROOM
from manta.cluster.protocol import ExitCode
from manta.cluster.supervise.event_log import POLL, Event
from manta.cluster.supervise.failure import Cause
from manta.cluster.tail import Tail
from manta.data.messages import MessageConsole
from manta.launch.terminal import count_text, notify, resume_hint
from manta.trainer.checkpoint.manifest import name_of_step
from manta.trainer.config.training import TrainingConfig
from manta.trainer.dist.layout import Layout
from manta.trainer.metrics import Line, end_of_last_line, format_duration, format_line, parse_line
from manta.trainer.run_directory import RunDirectory

INTERVAL = 10.0  # seconds between lines without a terminal
SILENCE, LONG_SILENCE, LONG_WAIT = 5.0, 30.0, 60.0  # seconds without a line while a run starts: at first, and after a long wait
SHORT_WAIT = 3.0  # seconds for which a run may wait for anything before this is shown
WAITING_FOR = {  # phases before an attempt's first step, in their order
    "": "the ranks to start",
    "start": "the ranks to join each other",
    "load": "the ranks to load",
    "restore": "the ranks to load a checkpoint",
    "read": "the first samples",
    "compile": "the first step, which takes longer if it compiles",
    "step": "the first step",
}
SPIKE_ACTIONS = {"skip": "; the update is skipped", "rollback": "; training goes back, and skips the samples of this step"}
SMOOTHING = 0.1  # weight of the newest step in the moving average of the time per sample
TRACEBACK_LINES = 12  # last lines of a traceback to show


class Display:
    """Shows a controller's events, and the metrics that the ranks write."""

    def __init__(self, run_dir: RunDirectory, config: TrainingConfig, fallback_layouts: Mapping[int, Layout]) -> None:
        """fallback_layouts: the run's layouts on fewer ranks than its config asks for."""
        self._run_dir, self._config, self._fallback_layouts = run_dir, config, fallback_layouts
        self._steps, self._timeline, self._checkpoints = config.train.steps, config.timeline(), run_dir.open_checkpoints()
        self._console = MessageConsole(sys.stdout)
        self._bar: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[status]}", markup=False))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=self._steps, completed=run_dir.saved_step(), status="starting")
        self._metrics = Tail(run_dir.metrics_file, end_of_last_line(run_dir.metrics_file))
        self._seconds_per_sample: float | None = None
        self._last_print = 0.0
        self._unprinted = ""  # the newest step's line, if it was not due
        self._is_loading = False  # the ranks of an attempt have started, and it is unknown what they resume from
        self._has_stepped = False  # in the newest attempt
        self._waiting_for, self._waiting_since, self._silent_since = "", 0.0, time.monotonic()
        self._started = time.time()
        self._failure: Event | None = None  # the rank failure that ended the newest attempt
        self._known_bad = set(self._checkpoints.bad())

    def follow(self, events: Iterator[Event]) -> int:
        """Show all events. Return the exit code of the last one."""
        code: int = ExitCode.FAILED
        with self._bar or nullcontext():
            for event in events:
                self._show(event)
                code = event.details.get("exit_code", code)
        return code

    def _show(self, event: Event) -> None:
        try:
            if not self._is_loading:  # else the first steps could be shown before the step that they resume from
                for line in self._metrics.lines(parse_line):
                    self._show_metrics(line)
            self._is_loading = event.kind == "attempt-started" or (self._is_loading and event.kind == POLL)
            if event.kind == "run-ended" and self._unprinted:
                self._console.message(self._unprinted)
            if event.kind in {"first-step", "attempt-stopped"}:
                self._has_stepped = event.kind == "first-step"
            if event.kind == POLL:
                self._show_waiting(event)
            elif message := self._message(event):
                self._console.message(message)
                self._silent_since = time.monotonic()
            if event.kind == "run-ended" and event.details["exit_code"] == ExitCode.FAILED and self._failure:
                notify(self._error(self._failure))
        except OSError:  # the terminal was closed
            self._console.quiet = True

    def _show_waiting(self, event: Event) -> None:
        """Show what the run waits for before it steps, and for how long, every few seconds."""
        phases = {rank["phase"] for rank in event.details.get("ranks", ())}
        waiting_for = event.details.get("waiting_for") or next((text for phase, text in WAITING_FOR.items() if phase in phases), "")
        now = time.monotonic()
        if waiting_for != self._waiting_for:
            self._waiting_for, self._waiting_since = waiting_for, now
        if not waiting_for or self._has_stepped:
            return
        waited = now - self._waiting_since
        text = "starting" if waited < SHORT_WAIT else f"waiting for {waiting_for}, {waited:.0f} s"
        if self._bar:
            self._bar.update(self._task, status=text)
        elif waited >= SHORT_WAIT and now - self._silent_since >= (SILENCE if waited < LONG_WAIT else LONG_SILENCE):
            self._console.message(text)
            self._silent_since = now

    def _show_metrics(self, line: Line) -> None:
        samples_left = self._timeline.first_sample(self._steps) - self._timeline.first_sample(line["step"])
        newest, average = float(line["step_time"] / line["global_batch"]), self._seconds_per_sample
        self._seconds_per_sample = newest if average is None else (1 - SMOOTHING) * average + SMOOTHING * newest
        eta = f"  ETA {format_duration(self._seconds_per_sample * samples_left)}" if samples_left else ""
        status = f"{format_line(line)}{eta}"
        if self._bar:
            self._bar.update(self._task, completed=line["step"], status=status)
        self._unprinted = f"step {line['step']}/{self._steps}  {status}"
        is_due = time.monotonic() - self._last_print >= INTERVAL and not self._bar
        if is_due or any(key.startswith("eval/") for key in line) or line.get("skipped") or line.get("checkpoint/failures"):
            self._console.message(self._unprinted)
            self._last_print, self._unprinted = time.monotonic(), ""

    def _message(self, event: Event) -> str | None:  # noqa: C901, PLR0911, PLR0912  a table: one line per kind of event
        """Return an event's message, or None if it is only for the event log."""
        details, attempt, run_dir = event.details, f"attempt {event.attempt}", self._run_dir
        match event.kind:
            case "run-started":
                self._started = event.time
                return None
            case "rank-failed" if details["cause"] == Cause.SPIKE.name:
                return None  # the spike itself was shown
            case "rank-failed":
                self._failure = event
                failure = f"rank {details['rank']} failed at step {details['step']}"
                return f"{attempt}: {failure}: {details['message']} ({run_dir.log(event.attempt, details['rank'] or 0)})"
            case "spike" | "not-finite":
                return f"{details['message']}{SPIKE_ACTIONS.get(details['action'], '')}"
            case "rank-slow":
                ratio = details.get("ratio") or details["times"]  # times: the name in older event logs
                straggler = f"rank {details['rank']} on {details['node']} is {ratio:.1f}x slower than the median rank"
                times = f"{details['work']:.3g} s of compute in step {details['step']}, median {details['median']:.3g} s"
                return f"{attempt}: {straggler}: {times}; all ranks wait for it. Look for other work on that machine (top, nvidia-smi)."
            case "node-ready" if details.get("differs"):
                versions = ", ".join(details["differs"])
                return f"{details['host']} ({details['address']}): package versions differ from this machine's: {versions}"
            case "node-lost":
                self._failure = None
                return f"{attempt}: node {details['node']} lost: {details['message']}"
            case "disk-full":
                lines = f"{details['unwritten']:,} bytes of metrics and events wait in memory"
                remedy = "Free some space" if details["message"] in map(os.strerror, NO_ROOM) else "Correct that"
                return f"{run_dir.path}: {details['message']}: training continues, {lines}. {remedy}; they are written then."
            case "tracker-ended" if details["starts"] == 1:  # else it fails again and again: once is enough
                return f"the trackers ended, and are started again: {details['message']} ({run_dir.logs}/companion.log). Training continues"
            case "disk-free":
                return f"{run_dir.path}: there is room again, everything is written"
            case "waiting":
                return f"waiting: {details['message']}"
            case "nodes-gathered":
                return self._gathered(details["ranks"], [node["address"] for node in details["nodes"]])
            case "nodes-appeared":
                return f"{attempt}: {count_text(details['ranks'], 'rank')} can run now: saving, then continuing on them"
            case "nodes-draining":
                nodes = ", ".join(details["nodes"]) or "the node that manta runs on"
                return f"{attempt}: draining {nodes}: saving{'' if details['here'] else ', then continuing without it'}"
            case "head-lost":
                return f"{attempt}: Ray's head node is lost: saving, then continuing under a new one"
            case "decided" if details["decision"] not in {"reallocate", "regroup"}:
                return f"{attempt}: {details['decision']}" + (f": {details['reason']}" if "reason" in details else "")
            case "loaded":
                return self._loaded(attempt, details["step"])
            case "leaving":
                return "stop requested: saving"
            case "run-ended" if "message" in details:
                return details["message"]
            case "run-ended" if details["exit_code"] == ExitCode.DONE:
                took = format_duration(event.time - self._started)
                command = "generate" if self._config.model.family in {"llama", "gpt2"} else "status"
                return f"done: {count_text(self._steps, 'step')}, {took} since the last start; next: manta {command} {run_dir.quoted}"
            case "run-ended" if details["exit_code"] in {ExitCode.SAVED, ExitCode.UNSAVED, ExitCode.INTERRUPTED}:
                return f"stopped; {resume_hint(run_dir)}"
            case _:
                return None

    def _loaded(self, attempt: str, step: int) -> str | None:
        """Name the checkpoint that the ranks have loaded, and those that they found damaged and skipped."""
        bad = ", ".join(sorted(set(self._checkpoints.bad()) - self._known_bad))
        skipped = f"; skipped the damaged {bad}: see {self._run_dir.logs}" if bad else ""
        if step:
            return f"{attempt}: resumed from step {step} ({self._checkpoints.location(name_of_step(step))}){skipped}"
        if self._config.run.start_from is not None:
            return f"{attempt}: started from the weights of {self._config.run.start_from}"
        return None if attempt == "attempt 1" else f"{attempt}: started from step 1: there is no checkpoint yet"

    def _gathered(self, ranks: int, addresses: Sequence[str]) -> str | None:
        """Describe the ranks of an attempt, and the sizes that differ from the config's because there are too few."""
        fallback = self._fallback_layouts.get(ranks)
        if len(addresses) == 1 and not fallback:
            return None
        parts = [f"{count_text(ranks, 'rank')} on {', '.join(addresses)}"]
        if fallback:
            sizes = [(name, getattr(self._config.parallel, name), getattr(fallback, name)) for name in ("tensor", "sequence", "expert")]
            parts += [f"parallel.{name} {size} -> {now}" for name, size, now in sizes if now != size] + ["until more are available"]
        return ", ".join(parts)

    def _error(self, failure: Event) -> str:
        """Return the end of the traceback of the rank that made the run give up."""
        rank, message = failure.details["rank"], failure.details["message"]
        traceback = failure.details.get("traceback", "").rstrip()
        lines = traceback.splitlines()[-TRACEBACK_LINES:]
        if not traceback.endswith(message):
            lines.append(message)
        return "\n".join([*lines, f"log of rank {rank} in attempt {failure.attempt}: {self._run_dir.log(failure.attempt, rank or 0)}"])
