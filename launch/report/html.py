"""The report of a run, or of several, as one HTML file that needs no other file and no network."""

import base64
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import fmean, median
from textwrap import shorten
from typing import Any

import jinja2
from pydantic import BaseModel

from manta.data.storage.atomic import write_atomically
from manta.launch import __version__
from manta.launch.goodput import Category
from manta.launch.inspect.charts import percent
from manta.launch.report.series import RunRecord, axes, charts, expert_loads, is_number, read_run, step_of, timeline
from manta.launch.terminal import count_text
from manta.trainer.metrics import Line, energy, format_duration, format_energy
from manta.trainer.serve.texts import GeneratedText, read_texts

MOST_ROWS, LONGEST_TEXT = 400, 600  # of a table, and characters of a value
MARKED = {"rank-failed", "node-lost", "spike", "not-finite"}  # events that are shown in each chart
UNLISTED = {"node-ready", "first-step", "attempt-stopped"}
UNSHOWN = {"time", "event", "attempt", "traceback", "machine", "address"}  # keys of events
BESIDE = Path(__file__).parent

Row = tuple[str, ...]


def write_report(directory: Path, file: Path | None = None, *, problem: str = "") -> Path:
    """Write the report of a run to a file, by default RUN/report.html. Returns its path.

    problem: why texts are missing, to show beside those of samples.jsonl. Raises InputError if it is no run, and OSError.
    """
    run = read_run(directory)
    file = file or run.path / "report.html"
    write_atomically(file, render([run], samples=read_texts(run.path / "samples.jsonl"), problem=problem))
    return file


def render(
    runs: Sequence[RunRecord], *, comparison: Mapping[str, Any] | None = None, samples: Sequence[GeneratedText] = (), problem: str = ""
) -> bytes:
    """Return the HTML. comparison: of `compare`, for several runs. samples: texts to show. problem: why some are missing."""
    drawn, left_out = charts(runs)
    loads = [expert_loads(run) for run in runs]
    data = {
        "charts": drawn,
        "runs": [
            {"name": run.name, "axes": axes(run), "marks": list(_marks(run)), "loads": load} for run, load in zip(runs, loads, strict=True)
        ],
    }
    style, script = ((BESIDE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    sources = {"default": "'none'", "img": "data:", "style": f"'{_hash(style)}'", "script": f"'{_hash(script)}'"}
    policy = "; ".join(f"{kind}-src {source}" for kind, source in sources.items()) + "; base-uri 'none'; form-action 'none'"
    jinja = jinja2.Environment(loader=jinja2.FileSystemLoader(BESIDE), undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True)
    text = jinja.get_template("report.html.jinja").render(
        title=" and ".join(run.name for run in runs),
        version=__version__,
        style=style,
        script=script,
        policy=policy,
        data=data,
        left_out=left_out,
        runs=[_sections(run) for run in runs],
        comparison=comparison,
        samples=samples,
        problem=problem,
    )
    return text.encode(errors="replace")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _sections(run: RunRecord) -> dict[str, Any]:
    """Return what the template shows of one run, apart from charts."""
    spent, start = run.goodput, run.events[0]["time"] if run.events else 0.0
    categories = list(Category)
    return {
        "name": run.name,
        "tiles": list(results(run).items()),
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(start)) if start else "",
        "goodput": [
            (categories.index(one), one.value, format_duration(value), value / (spent.total or 1.0)) for one, value in spent.seconds.items()
        ],
        "goodput_share": percent(spent.share),
        "total": format_duration(spent.total),
        "timeline": [(first, end, categories.index(category), category.value) for first, end, category in timeline(run.spans)],
        "ticks": sorted(_ticks(run, start, spent.total), key=itemgetter(2)),  # failures are above the others
        "events": [(f"+{format_duration(max(0.0, event['time'] - start))}", *_event(event)) for event in _listed(run)],
        "config": [(key, _cut(value), is_default) for key, value, is_default in config_rows(run.config)][:MOST_ROWS],
        "manifest": list(manifest_rows(run.manifest).items())[:MOST_ROWS],
    }


def results(run: RunRecord) -> dict[str, str]:
    """Return what a run has achieved, as text: state, losses, speed, time."""
    last: Line = run.lines[-1] if run.lines else {}
    evaluated = [line for line in run.lines if is_number(line.get("eval/loss"))]
    found = {
        "state": run.state + (f": {shorten(run.reason, 200)}" if run.reason not in {"", run.state} else ""),
        "steps": f"{last.get('step', 0):,} of {run.config.train.steps:,}",
        "loss": f"{last['train/loss']:.4f}" if last else "none yet",
    }
    if evaluated:
        best = min(evaluated, key=lambda line: line["eval/loss"])
        found["validation loss"] = f"{evaluated[-1]['eval/loss']:.4f}"
        found["best validation loss"] = f"{best['eval/loss']:.4f} at step {best['step']:,}"
    if bits := [line["eval/bits_per_byte"] for line in run.lines if is_number(line.get("eval/bits_per_byte"))]:
        found["bits per byte"] = f"{bits[-1]:.4f}"
    if is_number(last.get("tokens")):
        found["tokens"] = f"{last['tokens']:,}"
    for key, label, form, average in (("tokens_per_second", "tokens/s, median", ",.0f", median), ("mfu", "MFU, mean", ".1%", fmean)):
        if values := [line[key] for line in run.lines if is_number(line.get(key))]:
            found[label] = format(float(average(values)), form)
    found |= format_energy(energy(run.lines))
    failures = sum(event["event"] in {"rank-failed", "node-lost"} for event in run.events)
    attempts = max((event["attempt"] for event in run.events), default=0)
    found["attempts"] = f"{attempts}, {count_text(failures, 'failure')}" if failures else f"{attempts}"
    found["time"] = format_duration(run.goodput.total)
    found["goodput"] = percent(run.goodput.share)
    return found


def config_rows(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, str, bool]]:
    """Yield each key of a config, its value as JSON, and whether that is the default."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from config_rows(value, f"{prefix}{name}.")
        else:
            is_default = not field.is_required() and value == field.get_default(call_default_factory=True)
            yield f"{prefix}{name}", json.dumps(_without_unset(section.model_dump(mode="json", include={name})[name])), is_default


def _without_unset(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_unset(value) for key, value in tree.items() if value is not None}
    return [_without_unset(item) for item in tree] if isinstance(tree, list) else tree


def manifest_rows(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return each value of a manifest as text, by dotted key."""
    rows = dict[str, str]()
    for key, value in tree.items():
        if isinstance(value, dict):
            rows |= manifest_rows(value, f"{prefix}{key}.")
        else:
            rows[f"{prefix}{key}"] = _cut(value if isinstance(value, str) else json.dumps(value))
    return rows


def _marks(run: RunRecord) -> Iterator[dict[str, Any]]:
    """Yield the events that are shown at their step in each chart."""
    for event in _listed(run):
        if event["event"] in MARKED and is_number(step := step_of(event, run.lines)):
            yield {"step": step, "text": _title(event)}


def _ticks(run: RunRecord, start: float, total: float) -> Iterator[tuple[float, str, bool]]:
    """Yield the place of each event on the time axis, what it is, and whether it is a failure."""
    for event in _listed(run):
        yield _share(event["time"] - start, total), _title(event), event["event"] in MARKED


def _listed(run: RunRecord) -> list[dict[str, Any]]:
    """Return the events to show; of very many, the last ones."""
    return [event for event in run.events if event["event"] not in UNLISTED][-MOST_ROWS:]


def _event(event: Mapping[str, Any]) -> Row:
    details = {key: value for key, value in event.items() if isinstance(value, str | int | float) and key not in UNSHOWN}
    message = str(details.pop("message", ""))
    rest = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in details.items())
    return event["event"], str(event["attempt"]), _cut(f"{message} ({rest})" if message and rest else message or rest)


def _title(event: Mapping[str, Any]) -> str:
    kind, attempt, text = _event(event)
    return shorten(f"{kind}, attempt {attempt}: {text}", 160)


def _share(part: float, whole: float) -> float:
    return min(max(0.0, part / whole), 1.0) if whole > 0 else 0.0


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} …"
