"""`manta data mixture`: which source gives how much by when, known before the first step."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from manta.data.config import DataConfig
from manta.data.sampling.sampler import Sampler
from manta.data.sampling.timeline import Timeline
from manta.data.shards.statistics import windows_by_stream
from manta.launch.inspect.charts import console, percent, stacked, swatch
from manta.launch.inspect.resolve import Opened

Told = dict[str, Any]
_BETWEEN = 8  # rows, besides those where something changes
_ACROSS = 3  # sources that a table has room for
_WIDTH, _HEIGHT = 72, 12  # letters of the picture


@dataclass(frozen=True, slots=True)
class _Mix:
    """Which source gives how much of a run, up to any step."""

    names: tuple[str, ...]
    windows: tuple[int, ...]  # of each source: an epoch
    caps: tuple[float | None, ...]
    draws: Sampler
    unskipped: Sampler  # as if nothing were skipped: what is passed over is gone all the same
    timeline: Timeline
    data: DataConfig

    def shares(self, step: int) -> list[float]:
        """Of a step that so many were done before."""
        if not self.data.mixture:
            return [windows / sum(self.windows) for windows in self.windows]
        weights = self.data.mixture[self.stage(step)].weights
        return [weights.get(name, 0.0) / sum(weights.values()) for name in self.names]

    def stage(self, step: int) -> int:
        """Of the mixture, which one a step begins in that so many were done before. As `draws.build_mixture` has them."""
        begins = [-(-stage.from_tokens // self.data.sequence_length) for stage in self.data.mixture]
        return bisect_right(begins, self._reached(step)) - 1

    def taken(self, step: int) -> list[float]:
        """Samples of each source that so many steps have read."""
        return self._by_source(self.draws.samples_by_source(self.timeline.first_sample(step)))

    def epochs(self, step: int) -> list[float]:
        """How far so many steps have come in each source."""
        passed = self._by_source(self.unskipped.samples_by_source(self._reached(step)))
        return [samples / windows for samples, windows in zip(passed, self.windows, strict=True)]

    def _reached(self, step: int) -> int:
        """The first sample number that so many steps have not come to."""
        return int(self.draws.sample_numbers(np.array([self.timeline.first_sample(step)]))[0])

    def _by_source(self, samples: Sequence[int]) -> list[float]:
        """Of one draw, each source has what is in proportion to its size."""
        return list(map(float, samples)) if self.data.mixture else [samples[0] * windows / sum(self.windows) for windows in self.windows]


def mixture(opened: Opened, *, steps: int | None, png: Path | None) -> Told:
    """All figures, as JSON has them. steps: how far; as far as the run goes where not given."""
    config = opened.config
    data, timeline, last = config.data, config.timeline(), steps or config.train.steps
    draws = opened.samples().sampler
    windows = [count for draw in draws.sources for count in windows_by_stream(draw).tolist()]
    mix = _Mix(
        names=tuple(source.resolved_name for source in data.sources),
        windows=tuple(windows),
        caps=tuple(source.epochs for source in data.sources),
        draws=draws,
        unskipped=Sampler(draws.sources, data.model_copy(update={"skip": ()})),
        timeline=timeline,
        data=data,
    )
    changes = _changes(mix, last)
    told: Told = {
        "steps": last,
        "tokens": timeline.tokens(last),
        "mixed": bool(data.mixture),
        "sources": [
            {"source": name, "samples": count, "tokens": count * data.sequence_length, "most_epochs": cap}
            for name, count, cap in zip(mix.names, mix.windows, mix.caps, strict=True)
        ],
        "rows": [_row(mix, step, changes.get(step, [])) for step in _steps(changes, last)],
        "warnings": _warnings(mix, last, config.train.steps),
        "shares": [mix.shares(min(last - 1, column * last // _WIDTH)) for column in range(_WIDTH)],
    }
    if png is not None:
        from manta.launch.inspect import figures

        every = sorted({*_steps(changes, last), *(point * last // 400 for point in range(401))})
        told["png"] = [figures.mixture(png, mix.names, [_row(mix, step, []) for step in every])]
    return told


def _changes(mix: _Mix, last: int) -> dict[int, list[str]]:
    """By steps done: what begins with the next one."""
    found: dict[int, list[str]] = {}
    for before, phase in pairwise(mix.timeline.stages):
        if before.global_batch != phase.global_batch:
            found.setdefault(phase.first_step, []).append(f"batch {phase.global_batch:,}")
        if before.sequence_length != phase.sequence_length:
            found.setdefault(phase.first_step, []).append(f"length {phase.sequence_length:,}")
    for number in range(1, len(mix.data.mixture)):
        step = _first(last, lambda step, number=number: mix.stage(step) >= number)
        if step is not None:
            found.setdefault(step, []).append(f"stage {number + 1}")
    return {step: what for step, what in found.items() if step < last}


def _first(last: int, holds: Callable[[int], bool]) -> int | None:
    """The first number up to `last` for which it holds; for all beyond one, it does too."""
    if not holds(last):
        return None
    return bisect_left(range(last + 1), 1, key=holds)


def _steps(changes: dict[int, list[str]], last: int) -> list[int]:
    """The beginning, the end, where something changes, and some between that are not next to these."""
    kept = {0, last, *changes}
    near = last / (2 * _BETWEEN)
    between = (part * last // _BETWEEN for part in range(1, _BETWEEN))
    return sorted(kept | {step for step in between if min(abs(step - other) for other in kept) >= near})


def _row(mix: _Mix, step: int, begins: list[str]) -> Told:
    """After so many steps; the share is of the next one."""
    last = mix.timeline.stage(step)
    columns = zip(mix.names, mix.shares(step), mix.taken(step), mix.epochs(step), strict=True)
    return {
        "step": step,
        "tokens": mix.timeline.tokens(step),
        "begins": begins,
        "global_batch": last.global_batch,
        "sequence_length": last.sequence_length,
        "sources": {
            name: {"share": share, "tokens": round(samples * mix.data.sequence_length), "epochs": epochs}
            for name, share, samples, epochs in columns
        },
    }


def _warnings(mix: _Mix, last: int, run: int) -> list[Told]:
    """Where a source begins again, and where it would be read more often than it may. The step is that of metrics.jsonl."""
    found: list[Told] = []
    for index, (name, cap) in enumerate(zip(mix.names, mix.caps, strict=True)):
        ends = [(1.0, "again")] if cap is None else [(cap, "cap"), *([(1.0, "again")] if cap > 1 else [])]
        for limit, kind in ends:
            step = _first(last, lambda step, index=index, limit=limit: mix.epochs(step)[index] > limit)
            if step is not None:
                found.append({"source": name, "step": step, "kind": kind, "epochs": limit, "in_run": step <= run})
    return sorted(found, key=lambda warning: (warning["step"], warning["source"]))


def show(told: Told) -> None:
    out = console()
    names = [source["source"] for source in told["sources"]]
    if not told["mixed"]:
        out.print("no data.mixture: all sources are read as one, each in proportion to its size")
    for first in range(0, len(names), _ACROSS):
        out.print(_table(told, names[first : first + _ACROSS]))
        out.print()
    for index, (line, drawn) in enumerate(zip(range(_HEIGHT), stacked(told["shares"], _HEIGHT), strict=True)):
        label = {0: "100 %", _HEIGHT // 2: " 50 %", _HEIGHT - 1: "  0 %"}.get(line, "")
        legend = Text.assemble("  ", swatch(len(names) - 1 - index), f" {names[len(names) - 1 - index]}") if index < len(names) else Text()
        out.print(Text.assemble(f"{label:>6} ", drawn, legend), no_wrap=True, overflow="ellipsis")
    end = f"step {told['steps']:,}"
    out.print(f"       step 1{end:>{_WIDTH - 6}}")
    for warning in told["warnings"]:
        out.print(_warned(warning), soft_wrap=True, style="bold")
    for path in told.get("png", ()):
        out.print(f"drawn: {path}", soft_wrap=True)


def _warned(warning: Told) -> str:
    name, step = warning["source"], warning["step"]
    if warning["kind"] == "again":
        return f"{name}: read once by step {step:,}; from there on its text comes again"
    return (
        f"{name}: read more than its epochs {warning['epochs']:g} from step {step:,} on: shorten the run, lower its weight, or raise epochs"
    )


def _table(told: Told, names: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in ("steps done", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in names:
        table.add_column(f"{name}\nshare", justify="right")
        table.add_column("\ntokens", justify="right", no_wrap=True)
        table.add_column("\nepochs", justify="right", no_wrap=True)
    table.add_column("begins here")
    for row in told["rows"]:
        cells: list[str] = []
        for name in names:
            of = row["sources"][name]
            cells += [percent(of["share"]), _short(of["tokens"]), f"{of['epochs']:.2f}"]
        table.add_row(f"{row['step']:,}", _short(row["tokens"]), *cells, ", ".join(row["begins"]))
    return table


def _short(tokens: int) -> str:
    """As people say it: 999, 12.3 k, 1.25 M."""
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}" if tokens < 999.5 * size else f"{tokens / size:,.0f} {unit}"
    return f"{tokens}"
