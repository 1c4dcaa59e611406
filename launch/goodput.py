"""Goodput: where the time of a run went. Every second since its first start is in exactly one category.

It follows from events.jsonl and metrics.jsonl alone, at any time: the controller logs when attempts start and end, and rank 0 logs with
each step how many seconds of the attempt it has spent in each phase. Compare the categories of Google's ml-goodput-measurement.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf
from statistics import fmean, median
from typing import Any

from manta.trainer.metrics import Line

__all__ = ["Category", "Goodput", "Span", "goodput", "spans", "total"]

Event = Mapping[str, Any]
Seconds = dict["Category", float]


class Category(StrEnum):
    TRAINING = "training"
    START = "start-up"
    """Also the end of the processes, once the run is done."""
    COMPILE = "compile"
    """What the first step of an attempt, and of each sequence length, takes beyond the ideal step time."""
    DATA = "data wait"
    EVALUATION = "evaluation"
    SAVE = "checkpoint stall"
    RESTORE = "checkpoint restore"
    RECOMPUTED = "recomputed steps"
    """All that an attempt did after the checkpoint from which a later one resumed."""
    RESTART = "failure detection and restart"
    NODES = "waiting for nodes"
    SLOW = "slow steps"
    """What slow steps took beyond the ideal step time."""
    STOPPED = "stopped between attempts"


_OF_PHASE = {
    "restore": Category.RESTORE,
    "read": Category.DATA,
    "compile": Category.COMPILE,
    "step": Category.TRAINING,
    "evaluate": Category.EVALUATION,
    "save": Category.SAVE,
}  # a rank's other phases are a part of starting
_OF_STEPS = (Category.TRAINING, Category.COMPILE, Category.DATA, Category.EVALUATION, Category.SAVE, Category.SLOW)
_FAILURES = {"rank-failed", "node-lost"}
_ENDS = _FAILURES | {"attempt-stopped", "run-ended", "run-started"}  # run-started: of a controller that found the last one dead
_BETWEEN = {"run-started", "waiting", "nodes-gathered", "attempt-started", "run-ended"}


@dataclass(slots=True)
class Span:
    """A part of the run's time, in seconds since the epoch. `seconds`, by category, sum to its length."""

    start: float
    end: float
    seconds: Seconds
    attempt: int = 0
    """0: between attempts."""
    first_step: int = 0
    last_step: int = 0
    """The steps that were done in it: from first_step + 1 to last_step."""

    def move(self, seconds: float, source: Category, to: Category) -> None:
        self.seconds[source] = self.seconds.get(source, 0.0) - seconds
        self.seconds[to] = self.seconds.get(to, 0.0) + seconds


@dataclass(frozen=True, slots=True)
class Goodput:
    total: float
    """Seconds from the first start to the end, or until now."""
    seconds: Seconds
    """By category; they sum to the total."""

    @property
    def share(self) -> float:
        """The share of the time that was spent on steps which count."""
        return self.seconds[Category.TRAINING] / self.total if self.total else 0.0


def goodput(events: Sequence[Event], lines: Sequence[Line], *, now: float | None = None) -> Goodput:
    """Return where the time went.

    events, lines: all of both files, in order, also the lines of steps that a later attempt did again. now: if the run has not ended.
    """
    return total(spans(events, lines, now=now))


def total(parts: Sequence[Span]) -> Goodput:
    """Return the sum of a run's spans."""
    seconds = {category: sum(part.seconds.get(category, 0.0) for part in parts) for category in Category}
    return Goodput(sum(part.end - part.start for part in parts), seconds)


def spans(events: Sequence[Event], lines: Sequence[Line], *, now: float | None = None) -> list[Span]:
    """Return the run's time in parts without gaps."""
    attempts = dict[int, list[Line]]()
    for line in lines:
        attempts.setdefault(line["attempt"], []).append(line)
    parts = list(_Walk(events, attempts).spans(now))
    _set_apart_slow_steps(parts)
    loaded = {event["attempt"]: event["step"] for event in events if event["event"] == "loaded"}
    _set_apart_recomputed_steps(parts, loaded)
    return parts


class _Walk:
    """Reads the events of a run in order; yields the times between attempts, each in its category, and the parts of attempts."""

    def __init__(self, events: Sequence[Event], lines: Mapping[int, Sequence[Line]]) -> None:
        self._events, self._lines = events, lines
        self._loaded = {event["attempt"]: event["step"] for event in events if event["event"] == "loaded"}
        self._time: float = events[0]["time"] if events else 0.0  # up to which all is yielded
        self._idle = self._starting = Category.START  # what the time between attempts is now, and once there are nodes
        self._attempt = 0  # that runs; 0: none
        self._leaving: float | None = None  # when it was asked to stop

    def spans(self, now: float | None) -> Iterator[Span]:
        for event in self._events:
            kind, time = event["event"], float(event["time"])
            if self._attempt and kind in _ENDS:
                yield from self._end_attempt(event)
            if self._attempt:
                self._leaving = time if kind == "leaving" else self._leaving
            elif kind in _BETWEEN:
                if kind == "run-started" and self._idle is not Category.STOPPED:
                    yield from self._until(self._last_sign(time))
                    self._idle = Category.STOPPED
                yield from self._until(time)
                self._begin(event)
        if now is not None and self._attempt:
            yield from self._end_attempt({"event": "now", "time": max(now, self._time)})
        elif now is not None:
            yield from self._until(now)

    def _begin(self, event: Event) -> None:
        match event["event"]:
            case "run-started":
                self._idle = self._starting = Category.START
            case "waiting":
                self._idle = Category.NODES
            case "nodes-gathered":
                self._idle = self._starting
            case "run-ended":
                self._idle = Category.STOPPED
            case _:
                self._attempt = event["attempt"]

    def _until(self, end: float) -> Iterator[Span]:
        if end > self._time:
            yield Span(self._time, end, {self._idle: end - self._time})
            self._time = end

    def _end_attempt(self, end: Event) -> Iterator[Span]:
        kind = end["event"]
        if kind == "run-started":
            end = {"event": "killed", "time": self._last_sign(end["time"])}
        for span in self._parts(self._lines.get(self._attempt, ()), end):
            yield span
            self._time = span.end
        self._attempt, self._leaving = 0, None
        self._idle = self._starting = Category.RESTART if kind in _FAILURES else Category.START

    def _last_sign(self, before: float) -> float:
        """Return when a controller that wrote no end was last known to live: the last event or line before it was replaced."""
        times = [event["time"] for event in self._events] + [line.get("time", 0.0) for lines in self._lines.values() for line in lines]
        return max((time for time in times if time < before), default=before)

    def _parts(self, lines: Sequence[Line], end: Event) -> Iterator[Span]:
        """Yield the parts of an attempt: until its first line, between lines, and after the last one."""
        attempt, start = self._attempt, self._time
        before: Mapping[str, float] = {}
        first = self._loaded.get(attempt) or (lines[0]["step"] - 1 if lines else 0)
        for line in lines:
            spent = {phase: value - before.get(phase, 0.0) for phase, value in _phases(line).items()}
            seconds = dict.fromkeys((self._starting, *_OF_PHASE.values()), 0.0)
            for phase, value in spent.items():
                seconds[_OF_PHASE.get(phase, self._starting)] += value
            seconds[Category.TRAINING if before else self._starting] += line.get("time", 0.0) - start - sum(spent.values())
            yield Span(start, line.get("time", 0.0), seconds, attempt, first, line["step"])
            start, first, before = line.get("time", 0.0), line["step"], _phases(line)
        last = max(start, float(end["time"]))
        yield from self._after_last_line(Span(start, last, {}, attempt, first, first), lines, end)

    def _after_last_line(self, rest: Span, lines: Sequence[Line], end: Event) -> Iterator[Span]:
        working = Category.TRAINING if lines else self._starting
        match end["event"]:
            case "rank-failed":
                steps = max(0, end["step"] - rest.first_step) if lines else 0
                died = max(rest.start, rest.end - (end.get("noticed_after") or 0.0))
                worked = min(died, rest.start + steps * median(line["step_time"] for line in lines)) if steps else rest.start
                rest.last_step += steps
                yield from _split(rest, worked, Category.TRAINING, Category.RESTART)
            case "node-lost":
                yield from _split(rest, rest.start, working, Category.RESTART)
            case "now" | "killed":
                yield from _split(rest, rest.end, working, working)
            case _:
                asked = rest.start if self._leaving is None else min(max(rest.start, self._leaving), rest.end)
                yield from _split(rest, asked if lines else rest.end, working, Category.SAVE)


def _split(span: Span, at: float, first: Category, second: Category) -> Iterator[Span]:
    """Yield the two parts of a span; its steps are in the first one."""
    yield replace(span, end=at, seconds={first: at - span.start})
    yield replace(span, start=at, first_step=span.last_step, seconds={second: span.end - at})


def _phases(line: Line) -> Mapping[str, float]:
    """Return the seconds of each phase. Runs of older versions did not log them: all of their time counts as training."""
    return line.get("seconds", {})


def _set_apart_slow_steps(parts: Sequence[Span]) -> None:
    """Count what slow steps take beyond the ideal step time as slow; and as compiling only what the first step takes beyond it.

    Slow is a step of more than the median and three times the median absolute deviation of its attempt; ideal is the mean of all others.
    """
    by_attempt = dict[int, list[Span]]()
    for part in parts:
        if part.last_step > part.first_step and Category.DATA in part.seconds:
            by_attempt.setdefault(part.attempt, []).append(part)
    for of_attempt in by_attempt.values():
        steps = {id(part): part.last_step - part.first_step for part in of_attempt}
        usual = [part for part in of_attempt if not part.seconds[Category.COMPILE]]
        if not usual:
            continue
        times = [part.seconds[Category.TRAINING] / steps[id(part)] for part in usual]
        limit = median(times) + 3 * median(abs(time - median(times)) for time in times)
        ideal = fmean(time for time in times if time <= limit)
        for part in of_attempt:
            compiling = part.seconds[Category.COMPILE]
            part.move(min(compiling, ideal), Category.COMPILE, Category.TRAINING)
            excess = part.seconds[Category.TRAINING] - ideal * steps[id(part)]
            if not compiling and excess > (limit - ideal) * steps[id(part)]:
                part.move(excess, Category.TRAINING, Category.SLOW)


def _set_apart_recomputed_steps(parts: Sequence[Span], loaded: Mapping[int, int]) -> None:
    attempts = {part.attempt for part in parts}
    resumed = {attempt: min((step for later, step in loaded.items() if later > attempt), default=inf) for attempt in attempts}
    for part in parts:
        if (lost := part.last_step - max(part.first_step, resumed[part.attempt])) > 0:
            share = lost / (part.last_step - part.first_step)
            saved = {Category.SAVE} if part.first_step <= resumed[part.attempt] else set[Category]()  # the checkpoint itself was of use
            for category in set(_OF_STEPS) - saved:
                part.move(part.seconds.get(category, 0.0) * share, category, Category.RECOMPUTED)
