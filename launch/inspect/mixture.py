"""`manta data mixture`: the tokens and epochs of each source over a run, computed without running it."""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import pick_unit_and_suffix
from rich.table import Column, Table
from rich.text import Text

from manta.data.sampling.samples import Sampler
from manta.data.sampling.statistics import windows_by_stream
from manta.launch.config import RunConfig
from manta.launch.inspect.charts import console, number_column, percent, plain_table, stacked, swatch, visible
from manta.launch.inspect.resolve import DataTarget

Report = dict[str, Any]
_ROWS = 8  # evenly spaced rows, besides those at which something changes
_SOURCES_PER_TABLE = 3
_WIDTH, _HEIGHT = 72, 12  # characters of the chart


class _Plan:
    """What a run reads of each source up to any step."""

    def __init__(self, config: RunConfig, sampler: Sampler) -> None:
        self.data, self.timeline, self._sampler = config.data, config.timeline(), sampler
        # Skipped samples advance a source's epoch, too.
        self._unskipped = Sampler(sampler.sources, config.data.model_copy(update={"skip": ()}))
        self.names = [source.resolved_name for source in config.data.sources]
        self.windows = [count for source in sampler.sources for count in windows_by_stream(source).tolist()]  # of an epoch
        self.limits = [source.epochs for source in config.data.sources]

    def stage(self, step: int) -> int:
        """Return the stage of the mixture in which a step, counted from 0, starts; see `Sampler`."""
        tokens = self._next_sample(step) * self.data.sequence_length
        return sum(stage.from_tokens <= tokens for stage in self.data.mixture) - 1

    def shares(self, step: int) -> list[float]:
        """Return each source's share of a step, counted from 0."""
        if not self.data.mixture:
            return [windows / sum(self.windows) for windows in self.windows]
        weights = self.data.mixture[self.stage(step)].weights
        return [weights.get(name, 0.0) / sum(weights.values()) for name in self.names]

    def epochs(self, steps: int) -> list[float]:
        """Return how many epochs of each source the first `steps` steps complete."""
        passed = self._by_source(self._unskipped.samples_by_source(self._next_sample(steps)))
        return [samples / windows for samples, windows in zip(passed, self.windows, strict=True)]

    def row(self, steps: int, starts: Sequence[str] = ()) -> Report:
        """Return what the first `steps` steps read, and the shares of the next one. starts: what changes at that one."""
        stage = self.timeline.stage(steps)
        samples = self._by_source(self._sampler.samples_by_source(self.timeline.first_sample(steps)))
        columns = zip(self.names, self.shares(steps), samples, self.epochs(steps), strict=True)
        return {
            "step": steps,
            "tokens": self.timeline.tokens(steps),
            "begins": list(starts),
            "global_batch": stage.global_batch,
            "sequence_length": stage.sequence_length,
            "sources": {
                name: {"share": share, "tokens": round(count * self.data.sequence_length), "epochs": epochs}
                for name, share, count, epochs in columns
            },
        }

    def _next_sample(self, steps: int) -> int:
        return int(self._sampler.sample_numbers(np.array([self.timeline.first_sample(steps)]))[0])

    def _by_source(self, samples: Sequence[int]) -> Sequence[float]:
        """Without a mixture, divide the samples in proportion to the sizes of the sources."""
        return samples if self.data.mixture else [samples[0] * windows / sum(self.windows) for windows in self.windows]


def mixture(target: DataTarget, *, steps: int | None, png: Path | None) -> Report:
    """Return all figures. steps: how far; default: train.steps."""
    plan = _Plan(target.config, target.samples().sampler)
    last, length = steps or target.config.train.steps, plan.data.sequence_length
    changes = _changes(plan, last)
    # The first and last step, those of changes, and evenly spaced ones that are not close to these.
    fixed = {0, last, *changes}
    between = (part * last // _ROWS for part in range(1, _ROWS))
    rows = sorted(fixed | {step for step in between if min(abs(step - other) for other in fixed) >= last / (2 * _ROWS)})
    sources = zip(plan.names, plan.windows, plan.limits, strict=True)
    report: Report = {
        "steps": last,
        "tokens": plan.timeline.tokens(last),
        "mixed": bool(plan.data.mixture),
        "sources": [{"source": name, "samples": count, "tokens": count * length, "most_epochs": limit} for name, count, limit in sources],
        "rows": [plan.row(step, changes.get(step, ())) for step in rows],
        "warnings": _warnings(plan, last, target.config.train.steps),
        "shares": [plan.shares(min(last - 1, column * last // _WIDTH)) for column in range(_WIDTH)],
    }
    if png is not None:
        from manta.launch.inspect.figures import write_mixture

        points = sorted({*rows, *(point * last // 400 for point in range(401))})
        report["png"] = write_mixture(png, plan.names, [plan.row(step) for step in points])
    return report


def _changes(plan: _Plan, last: int) -> dict[int, list[str]]:
    """Return what starts at each step, counted from 0."""
    changes: defaultdict[int, list[str]] = defaultdict(list)
    for before, stage in pairwise(plan.timeline.stages):
        if before.global_batch != stage.global_batch:
            changes[stage.first_step].append(f"global batch {stage.global_batch:,}")
        if before.sequence_length != stage.sequence_length:
            changes[stage.first_step].append(f"length {stage.sequence_length:,}")
    for number in range(1, len(plan.data.mixture)):
        changes[bisect_left(range(last), number, key=plan.stage)].append(f"stage {number + 1}")
    return {step: starts for step, starts in changes.items() if step < last}


def _warnings(plan: _Plan, last: int, run: int) -> list[Report]:
    """Return the steps, as in metrics.jsonl, from which a source is repeated or read more often than it may be."""
    found: list[Report] = []
    for index, (name, limit) in enumerate(zip(plan.names, plan.limits, strict=True)):
        limits = {1.0: "again"} if limit is None else {limit: "cap"} if limit <= 1 else {limit: "cap", 1.0: "again"}
        for epochs, kind in limits.items():
            step = bisect_right(range(last + 1), epochs, key=lambda step, index=index: plan.epochs(step)[index])
            if step <= last:
                found.append({"source": name, "step": step, "kind": kind, "epochs": epochs, "in_run": step <= run})
    return sorted(found, key=lambda warning: (warning["step"], warning["source"]))


def show(report: Report) -> None:
    out = console()
    names = [source["source"] for source in report["sources"]]
    if not report["mixed"]:
        out.print("no data.mixture: each source is read in proportion to its size")
    for first in range(0, len(names), _SOURCES_PER_TABLE):
        out.print(_table(report["rows"], names[first : first + _SOURCES_PER_TABLE]))
        out.print()
    labels = {0: "100 %", _HEIGHT // 2: " 50 %", _HEIGHT - 1: "  0 %"}
    for line, chart in enumerate(stacked(report["shares"], _HEIGHT)):
        source = len(names) - 1 - line
        legend = Text.assemble("  ", swatch(source), swatch(source), f" {visible(names[source])}") if source >= 0 else Text()
        out.print(Text.assemble(f"{labels.get(line, ''):>6} ", chart, legend), no_wrap=True, overflow="ellipsis", soft_wrap=False)
    end = f"step {report['steps']:,}"
    out.print(f"       step 1{end:>{_WIDTH - 6}}")
    for warning in report["warnings"]:
        name, step = warning["source"], warning["step"]
        text = f"{name}: first epoch ends at step {step:,}, then repeats"
        if warning["kind"] == "cap":
            remedy = "shorten the run, lower its weight, or raise epochs"
            text = f"{name}: exceeds its limit (epochs: {warning['epochs']:g}) from step {step:,}: {remedy}"
        out.print(text, style="bold")
    for path in report.get("png", ()):
        out.print(f"wrote {path}")


def _table(rows: Sequence[Report], names: Sequence[str]) -> Table:
    by_source = [column for name in names for column in (f"{name}\nshare", number_column("\ntokens"), number_column("\nepochs"))]
    table = plain_table(number_column("steps done"), number_column("tokens"), *by_source, Column("starts here"))
    for row in rows:
        cells: list[str] = []
        for source in (row["sources"][name] for name in names):
            cells += [percent(source["share"]), _short(source["tokens"]), f"{source['epochs']:.2f}"]
        table.add_row(f"{row['step']:,}", _short(row["tokens"]), *cells, ", ".join(row["begins"]))
    return table


def _short(tokens: int) -> str:
    """Format a count in four digits: 999, 12.35 k, 1.25 M."""
    unit, suffix = pick_unit_and_suffix(tokens, ["", "k", "M", "G", "T"], 1000)
    return f"{tokens / unit:.4g} {suffix}".rstrip()
