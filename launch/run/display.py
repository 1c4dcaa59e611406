"""What a person sees while a run goes on: a bar on a terminal, a line an interval elsewhere, and every transition."""

import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from manta.cluster.protocol import ExitCode
from manta.cluster.supervise.event_log import POLL, Event
from manta.data.sampling.timeline import Timeline
from manta.launch.control.tail import Tail
from manta.trainer.dist.layout import shrunk_layouts
from manta.trainer.metrics import Line, end_of_last_line, format_duration, format_line, parse_lines
from manta.trainer.run_directory import RunDirectory

INTERVAL = 10.0  # seconds between lines where there is no terminal
SMOOTHING = 0.1  # share of the newest step in the average time a sample
EXCERPT = 12  # last lines of a traceback that are shown: the error, and where it was raised


class Voice(Console):
    """Speaks on standard error: standard output is for what a command was asked for. A listener who is gone is no reason to end a run."""

    def __init__(self) -> None:
        super().__init__(stderr=True, soft_wrap=True, highlight=False, markup=False)

    def on_broken_pipe(self) -> None:
        self.quiet = True


def say(text: str) -> None:
    """One line to the person."""
    Voice().print(text)


def stands(home: RunDirectory) -> str:
    """Where a run that has left goes on, and how."""
    saved = f"step {home.saved_step()} is saved" if home.saved_step() else "nothing is saved yet"
    return f"{saved}; go on with: manta resume {home.quoted}"


class Display:
    """Shows the events of a controller, and the metrics that the ranks write meanwhile."""

    def __init__(self, home: RunDirectory, steps: int, timeline: Timeline) -> None:
        self._home, self._steps, self._timeline = home, steps, timeline
        self._console = Voice()
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[told]}"))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=steps, completed=home.saved_step(), told="starting")
        self._metrics = Tail(home.metrics_file, end_of_last_line(home.metrics_file))
        self._pace: float | None = None
        self._spoke = 0.0
        self._begun = time.time()
        self._failed: Event | None = None  # what ended the newest attempt, where a rank did
        self._bad = set(home.open_checkpoints().bad())

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, event: Event) -> None:
        try:
            self._show(event)
        except OSError:  # the terminal is gone
            self._console.quiet = True

    def _show(self, event: Event) -> None:
        for line in parse_lines(self._metrics.lines().decode()):
            self._show_line(line)
        if event.kind != POLL and (told := self._tell(event)):
            self._console.print(told)

    def _show_line(self, line: Line) -> None:
        left = self._timeline.first_sample(self._steps) - self._timeline.first_sample(line["step"])
        newest = float(line["step_time"] / line["global_batch"])
        self._pace = newest if self._pace is None else (1 - SMOOTHING) * self._pace + SMOOTHING * newest
        told = f"{format_line(line)}  ETA {format_duration(self._pace * left)}"
        if self._bar:
            self._bar.update(self._task, completed=line["step"], told=told)
        due = time.monotonic() - self._spoke >= INTERVAL and not self._bar
        if due or "eval/loss" in line or line.get("skipped") or line.get("checkpoint/failures"):
            self._console.print(f"step {line['step']}/{self._steps}  {told}")
            self._spoke = time.monotonic()

    def _tell(self, event: Event) -> str | None:  # noqa: C901, PLR0911, PLR0912  a table: a line a kind
        """One line for a transition; None for one that only the journal wants."""
        details = event.details
        match event.kind:
            case "run-started":
                self._begun = event.time
                return None
            case "rank-failed":
                self._failed = event
                where = f"attempt {event.attempt}: rank {details['rank']} failed at step {details['step']}"
                return f"{where}: {details['message']} ({self._log(event)})"
            case "rank-slow":
                compared = f"{details['work']:.3g} s of step {details['step']} by itself, the median rank {details['median']:.3g} s"
                slower = f"rank {details['rank']} on {details['node']} is {details['times']:.1f}x slower than the median"
                return f"attempt {event.attempt}: {slower}: {compared}; all go at its pace"
            case "node-ready" if details.get("differs"):
                return f"{details['host']} ({details['address']}): other versions than here: {', '.join(details['differs'])}"
            case "node-lost":
                self._failed = None
                return f"attempt {event.attempt}: node {details['node']} lost: {details['message']}"
            case "waiting":
                return f"waiting: {details['message']}"
            case "nodes-gathered":
                return self._gathered(details["ranks"], [node["address"] for node in details["nodes"]])
            case "nodes-appeared":
                return f"attempt {event.attempt}: there is room for {details['ranks']} ranks now: saving, to go on with them"
            case "nodes-draining":
                going = ", ".join(details["nodes"]) or "the node that manta runs on"
                return f"attempt {event.attempt}: to be taken away: {going}: saving{'' if details['here'] else ', to go on without'}"
            case "head-lost":
                return f"attempt {event.attempt}: Ray's head is gone: saving, to go on under another"
            case "decided" if details["decision"] == "regroup":
                return None
            case "decided":
                return f"attempt {event.attempt}: {details['decision']}" + (f": {details['reason']}" if "reason" in details else "")
            case "first-step" if details["step"] > 1:
                return f"attempt {event.attempt}: went on from step {details['step'] - 1}{self._passed_over()}"
            case "leaving":
                return "told to leave: saving"
            case "run-ended":
                return self._ending(event)
            case _:
                return None

    def _gathered(self, ranks: int, addresses: list[str]) -> str | None:
        """Who trains; and what the config says otherwise, where ranks are too few for it."""
        config = self._home.config()
        instead = shrunk_layouts(config.train, config.parallel).get(ranks)
        told = [] if len(addresses) == 1 and not instead else [f"{ranks} rank{'s' if ranks > 1 else ''} on {', '.join(addresses)}"]
        if instead:
            sizes = [(name, getattr(config.parallel, name), getattr(instead, name)) for name in ("tensor", "sequence", "expert")]
            told += [f"parallel.{name} {size} -> {now}" for name, size, now in sizes if now != size] + ["until there are more"]
        return ", ".join(told) or None

    def _passed_over(self) -> str:
        """What the ranks found bad, and named so."""
        bad = sorted(set(self._home.open_checkpoints().bad()) - self._bad)
        return f"; passed over {', '.join(bad)}: {self._home.path / 'logs'} says why" if bad else ""

    def _log(self, failed: Event) -> Path:
        return self._home.logs / f"attempt-{failed.attempt:04d}" / f"rank-{failed.details['rank'] or 0:04d}.log"

    def _ending(self, event: Event) -> str | None:
        """How it ended, where that leaves the run, and what comes next."""
        home, code = self._home, event.details["exit_code"]
        if code == ExitCode.DONE:
            took = format_duration(event.time - self._begun)
            writes = home.config().model.family in {"llama", "gpt2"}
            return f"done: {self._steps} steps, {took} since this start; try: manta {'generate' if writes else 'status'} {home.quoted}"
        if code in {ExitCode.SAVED, ExitCode.UNSAVED, ExitCode.INTERRUPTED}:
            return f"left; {stands(home)}"
        return self._last_words(self._failed) if self._failed and code == ExitCode.FAILED else None

    def _last_words(self, failed: Event) -> str:
        """The error that the run gave up over, as the rank that raised it, or was killed, left it."""
        message = failed.details["message"]
        trace = failed.details.get("traceback", "").rstrip()
        lines = trace.splitlines()[-EXCERPT:]
        lines += [] if trace.endswith(message) else [message]
        return "\n".join([*lines, f"rank {failed.details['rank']} of attempt {failed.attempt}, all that it wrote: {self._log(failed)}"])
