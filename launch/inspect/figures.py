"""Charts of `manta data` as PNG, drawn by matplotlib, which is an optional dependency."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from manta.data.config import DataConfig
from manta.data.errors import InputError
from manta.data.sampling.statistics import LengthHistogram

Rows = Sequence[Mapping[str, Any]]

_STYLE = Path(__file__).with_name("figures.mplstyle")


@mpl.rc_context(fname=_STYLE)
def write_corpus(directory: Path, sources: Rows, lengths: Mapping[str, LengthHistogram], data: DataConfig) -> list[str]:
    """Write lengths.png and sources.png. Returns their paths."""
    lengths_figure = _lengths(lengths, data.sequence_length)
    return [_save(lengths_figure, directory / "lengths.png"), _save(_sources(sources), directory / "sources.png")]


@mpl.rc_context(fname=_STYLE)
def write_mixture(directory: Path, names: Sequence[str], rows: Rows) -> list[str]:
    """Write mixture.png: shares over the run, and the epochs of each source. Returns its path."""
    return [_save(_mixture(names, rows), directory / "mixture.png")]


def _save(figure: Figure, path: Path) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        problem = f"got {path.parent} ({error.strerror})"
        raise InputError(f"--png: expected a directory that can be written, {problem}. Choose another one.") from None
    return str(path)


def _lengths(lengths: Mapping[str, LengthHistogram], sequence_length: int) -> Figure:
    """Documents and tokens by length, with sources stacked."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    nonempty = np.flatnonzero(sum(one.documents for one in lengths.values()))
    first, end = (int(nonempty[0]), int(nonempty[-1]) + 1) if len(nonempty) else (0, 1)
    edges = next(iter(lengths.values())).edges[first : end + 1]
    for axis, unit in zip(axes, ("documents", "tokens"), strict=True):
        counts = [getattr(one, unit)[first:end] for one in lengths.values()]
        total = max(sum(int(count.sum()) for count in counts), 1)
        shares = [100 * count / total for count in counts]
        axis.hist([edges[:-1]] * len(counts), edges, weights=shares, stacked=True, label=list(lengths))
        axis.axvline(sequence_length, color="black", lw=1.2, ls="--")
        by = "length" if unit == "documents" else "length of their document"
        axis.set(title=f"{total:,} {unit} by {by}", ylabel=f"% of {unit}")
        axis.grid(visible=False, axis="x")
    label = f" data.sequence_length {sequence_length:,}"
    axes[0].annotate(label, (sequence_length, 1), xycoords=("data", "axes fraction"), va="top", fontsize=9)
    axes[1].set_xscale("log", base=2)
    axes[1].set(xlim=(edges[0], edges[-1]), xlabel="tokens in a document")
    axes[1].xaxis.set_major_formatter("{x:,.0f}")
    if len(lengths) > 1:
        _legend(figure, axes[0], len(lengths))
    return figure


def _sources(sources: Rows) -> Figure:
    """Each source's shares of tokens and documents."""
    figure = Figure(figsize=(9, 1.4 + 0.55 * len(sources)), layout="constrained")
    axis = figure.subplots()
    rows, colors, totals, highest = np.arange(len(sources)), [f"C{row}" for row in range(len(sources))], list[int](), 0.0
    for unit, offset, height, alpha in (("tokens", -0.17, 0.34, 1), ("documents", 0.19, 0.22, 0.4)):
        counts = [source[unit] for source in sources]
        totals.append(sum(counts))
        bars = axis.barh(rows + offset, [100 * count / max(totals[-1], 1) for count in counts], height, color=colors, alpha=alpha)
        axis.bar_label(bars, [f" {count:,} {unit}" for count in counts], fontsize=9)
        highest = max(highest, 100 * max(counts) / max(totals[-1], 1))
    axis.set_yticks(rows, [source["source"] for source in sources])
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    title = f"{totals[0]:,} tokens in {totals[1]:,} documents, by source"
    axis.set(xticks=range(0, 101, 20), xlim=(0, 1.3 * highest), xlabel="% of all", title=title)
    return figure


def _mixture(names: Sequence[str], rows: Rows) -> Figure:
    """The shares of each step, and cumulative epochs."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in rows]
    shares = [[100 * row["sources"][name]["share"] for row in rows] for name in names]
    above.stackplot(steps, shares, labels=names, step="post", lw=0)
    above.set(ylim=(0, 100), ylabel="% of samples", title="shares of a step")
    for index, name in enumerate(names):
        epochs = [row["sources"][name]["epochs"] for row in rows]
        below.plot(steps, epochs, color=f"C{index}", lw=2, label=name)
        below.annotate(f" {epochs[-1]:.2f}", (steps[-1], epochs[-1]), color=f"C{index}", va="center", fontsize=9, annotation_clip=False)
    below.axhline(1, color="black", lw=1, ls="--")
    below.set_ylim(bottom=0)
    below.set(xlim=(0, steps[-1]), xlabel="steps done", ylabel="epochs", title="epochs of each source")
    below.xaxis.set_major_formatter("{x:,.0f}")
    _legend(figure, above, len(names))
    return figure


def _legend(figure: Figure, axis: Axes, names: int) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=min(names, 5), fontsize=9)
