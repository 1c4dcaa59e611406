"""What a report shows of a run, from the files of its directory alone: its curves, at most some hundred points each, and its times."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from manta.cluster.supervise.event_log import exit_code, read_events
from manta.launch.config import RunConfig, find_run, load
from manta.launch.control.status import RUNNING, STATES, exit_reason
from manta.launch.goodput import Category, Goodput, Span, spans, total
from manta.trainer.metrics import Line, read_all_metrics, valid_lines

POINTS, FEWEST, MOST = 30_000, 80, 1000  # of all curves, and of each one
MOST_CURVES, MOST_CELLS, MOST_COLUMNS = 240, 40_000, 120
MOST_REDONE = 10  # attempts
BUCKETS = 300  # of the time axis
LARGEST = 1e300  # larger numbers, and those that are not finite, are not shown

SINGLE = ("learning_rate", "grad_norm", "tokens_per_second", "mfu", "loss_scale")
PREFIXES = ("train/", "eval/", "memory/", "health/", "energy/")
METRICS = ("loss", "perplexity", "bits_per_byte", "accuracy")
SPLITS = {"train": "training", "eval": "validation"}
TITLES = {
    "loss": "Loss",
    "loss by source": "Loss by source",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Throughput, tokens/s",
    "mfu": "Model FLOPs utilization (MFU)",
    "memory": "Peak memory, bytes",
}
ORDER = (*TITLES, "eval", "train", "loss_scale", "energy", "health")
LAST_TITLES = {
    "energy/kwh": "Energy, kWh",
    "energy/co2_kg": "CO2, kg",
    "health/grad_norm": "Gradient norm by group",
    "health/weight_norm": "Weight norm by group",
    "health/update_ratio": "Update-to-weight ratio by group",
    "health/activation_rms": "Activation RMS by block",
    "health/attention_logit": "Largest attention logit by block",
    "health/expert_entropy": "Entropy of expert load",
}  # of charts that ORDER has by their group


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run as its directory has it."""

    name: str
    path: Path
    config: RunConfig
    manifest: dict[str, Any]
    events: list[dict[str, Any]]
    lines: list[Line]
    """The valid line of each step."""
    redone: list[Line]
    """Those of steps that a later attempt did again."""
    state: str
    reason: str
    spans: list[Span]

    @property
    def goodput(self) -> Goodput:
        return total(self.spans)


def read_run(directory: Path) -> RunRecord:
    """Raises InputError if it is no run, and OSError if it cannot be read."""
    run_dir = find_run(directory)
    config, manifest = load(run_dir.config_file), run_dir.manifest().model_dump(mode="json")
    events, lines = read_events(run_dir.events_file), read_all_metrics(run_dir.metrics_file)
    valid = valid_lines(lines)
    kept = set(map(id, valid))
    is_running = run_dir.is_locked and exit_code(events) is None  # the report at the end is written before the lock is released
    return RunRecord(
        name=os.path.relpath(run_dir.path) if run_dir.path.is_relative_to(Path.cwd()) else str(run_dir.path),
        path=run_dir.path,
        config=config,
        manifest=manifest,
        events=events,
        lines=valid,
        redone=[line for line in lines if id(line) not in kept],
        state=RUNNING if is_running else STATES.get(exit_code(events), "failed"),
        reason="" if is_running else exit_reason(events),
        spans=spans(events, lines, now=time.time() if is_running else None),
    )


def read_runs(directories: Sequence[Path]) -> list[RunRecord]:
    """Return several runs, named by their paths below the directory that they are all in."""
    runs = [read_run(directory) for directory in directories]
    above = os.path.commonpath([run.path.parent for run in runs])
    return [replace(run, name=os.path.relpath(run.path, above)) for run in runs]


def charts(runs: Sequence[RunRecord]) -> tuple[list[dict[str, Any]], int]:
    """Return all charts, with the curves of all runs, and how many curves are not shown because there are too many."""
    names = [curve_names(run.lines) for run in runs]
    found = list(dict.fromkeys(key for keys in names for key in keys))
    found.sort(key=lambda key: (_place(key), key.count("/")))
    shown = found[: MOST_CURVES // len(runs)]
    points = min(MOST, max(FEWEST, POINTS // max(1, len(shown) * len(runs))))
    by_title = dict[str, list[dict[str, Any]]]()
    for key in shown:
        chart, label = _chart(key)
        curves = by_title.setdefault(chart, [])
        style = len({curve["key"] for curve in curves})
        for number, run in enumerate(runs):
            if key not in names[number]:
                continue
            curve = {"key": key, "label": label, "run": number, "style": style, "redone": _redone(key, run, points // 4)}
            curves.append(curve | _curve(key, run.lines, points))
    titled = [{"title": _title(chart), "curves": curves} for chart, curves in by_title.items()]
    return titled, len(found) - len(shown)


def curve_names(lines: Iterable[Line]) -> list[str]:
    """Return the keys of all numbers that make a curve."""
    keys = dict.fromkeys(key for line in lines for key, value in line.items() if is_number(value))
    return [key for key in keys if key in SINGLE or key.startswith(PREFIXES)]


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _chart(key: str) -> tuple[str, str]:
    """Return the chart of a curve, and its label there: `eval/bits_per_byte/web` is `web` in the chart of `eval/bits_per_byte`."""
    group, _, name = key.partition("/")
    metric, _, label = name.partition("/")
    if group == "memory" or not name:
        return group, name
    chart = "loss by source" if label else "loss"
    if group == "eval" and metric not in METRICS and (inner := label.partition("/"))[0] in METRICS:  # of a validation set
        metric, label, chart = inner[0], " ".join(filter(None, (metric, inner[2]))), "loss by source" if inner[2] else "loss"
    if group in SPLITS and metric == "loss":
        return chart, ", ".join(filter(None, (label, SPLITS[group])))
    return f"{group}/{metric}", label or "all"


def _title(chart: str) -> str:
    group, _, metric = chart.partition("/")
    return (TITLES | LAST_TITLES).get(chart, f"{SPLITS[group]} {metric}".capitalize() if group in SPLITS else chart).replace("_", " ")


def _place(key: str) -> int:
    chart = _chart(key)[0]
    return ORDER.index(chart if chart in ORDER else chart.split("/")[0])


def _curve(key: str, lines: Sequence[Line], points: int) -> dict[str, list[Any]]:
    """Return the curve of a key, as `thin` does."""
    present = [(line["step"], line[key]) for line in lines if is_number(line.get(key))]
    return thin([step for step, _ in present], [value for _, value in present], points)


def _redone(key: str, run: RunRecord, points: int) -> list[dict[str, list[Any]]]:
    """Return a curve for each of the newest attempts with steps that a later one did again."""
    attempts = dict[int, list[Line]]()
    for line in run.redone:
        if is_number(line.get(key)):
            attempts.setdefault(line["attempt"], []).append(line)
    newest = list(attempts.values())[-MOST_REDONE:]
    return [_curve(key, lines, points // len(newest)) for lines in newest]


def thin(steps: Sequence[int], values: Sequence[float], points: int) -> dict[str, list[Any]]:
    """Return at most `points` points. If there are more steps, each point is for several: y is their mean, low and high the extremes."""
    if len(steps) <= points:
        return {"x": list(steps), "y": [_rounded(value) for value in values]}
    parts = list(_parts(len(steps), points))
    curve: dict[str, list[Any]] = {"x": [steps[(first + end) // 2] for first, end in parts]}
    for name, summary in (("y", fmean), ("low", min), ("high", max)):
        curve[name] = [_rounded(summary(values[first:end])) for first, end in parts]
    return curve


def axes(run: RunRecord) -> dict[str, list[Any]]:
    """Return how many tokens a run had read at some of its steps, and how many hours after its start."""
    count = min(len(run.lines), MOST)
    lines = [run.lines[end - 1] for _, end in _parts(len(run.lines), count)]
    start = run.events[0]["time"] if run.events else 0.0
    hours = [_rounded(max(0.0, line.get("time", start) - start) / 3600) for line in lines]
    tokens = [line["tokens"] if is_number(line["tokens"]) else 0 for line in lines]
    return {"step": [line["step"] for line in lines], "tokens": tokens, "hours": hours}


def expert_loads(run: RunRecord) -> list[dict[str, Any]]:
    """Return, by layer, the load of each expert in percent of an equal share, over the steps. Of very many layers, only some."""
    layers = dict[str, int]()
    for line in run.lines:
        layers |= {key: len(value) for key, value in line.items() if key.startswith("load/") and isinstance(value, list) and value}
    fitting = max(1, MOST_CELLS // (8 * max(layers.values(), default=1)))
    shown = list(layers)[:: -(-len(layers) // fitting) or 1]
    columns = min(MOST_COLUMNS, max(1, MOST_CELLS // max(1, sum(layers[key] for key in shown))))
    found = list[dict[str, Any]]()
    for key in shown:
        lines = [(line["step"], line[key]) for line in run.lines if _is_load(line.get(key), layers[key])]
        parts = [lines[first:end] for first, end in _parts(len(lines), min(columns, len(lines)))]
        rows = [[round(100 * len(means) * mean) for mean in means] for means in map(_mean, parts)]
        if rows and layers[key] <= MOST_CELLS:
            found.append({"title": key.removeprefix("load/"), "x": [part[-1][0] for part in parts], "columns": rows})
    return found


def _is_load(value: object, experts: int) -> bool:
    return isinstance(value, list) and len(value) == experts and all(is_number(share) and 0 <= share <= 1 for share in value)


def _mean(part: Sequence[tuple[int, list[float]]]) -> list[float]:
    return [sum(shares) / len(part) for shares in zip(*(load for _, load in part), strict=True)]


def timeline(parts: Sequence[Span]) -> list[tuple[float, float, Category]]:
    """Return the run's time as a few hundred pieces: start and end as shares of it all, and what took most of the time in each."""
    if not parts or (whole := parts[-1].end - parts[0].start) <= 0:
        return []
    buckets = [dict[Category, float]() for _ in range(BUCKETS)]
    for part in parts:
        category = max(part.seconds, key=part.seconds.__getitem__, default=Category.STOPPED)
        first, last = (min(max(0.0, (at - parts[0].start) / whole * BUCKETS), BUCKETS) for at in (part.start, part.end))
        for number in range(int(first), min(BUCKETS, int(last) + 1)):
            share = min(last, number + 1) - max(first, number)
            buckets[number][category] = buckets[number].get(category, 0.0) + share
    pieces = list[tuple[float, float, Category]]()
    for number, bucket in enumerate(buckets):
        category = max(bucket, key=bucket.__getitem__, default=Category.STOPPED)
        start = pieces.pop()[0] if pieces and pieces[-1][2] is category else number / BUCKETS
        pieces.append((start, (number + 1) / BUCKETS, category))
    return pieces


def step_of(event: Mapping[str, Any], lines: Sequence[Line]) -> int | None:
    """Return the step at which something happened: as the event has it, or the last step before it."""
    if isinstance(step := event.get("step"), int):
        return step
    return max((line["step"] for line in lines if line.get("time", 0.0) <= event["time"]), default=None)


def _parts(count: int, parts: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the end of nearly equal parts."""
    for number in range(parts):
        yield number * count // parts, (number + 1) * count // parts


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
