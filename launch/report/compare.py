"""`manta compare`: how the configs and results of runs differ, where they diverge, and why."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Column

from manta.data.errors import InputError
from manta.launch.inspect.charts import console, plain_table, rule
from manta.launch.report.html import config_rows, manifest_rows, results
from manta.launch.report.series import RunRecord, curve_names
from manta.trainer.metrics import Line

NONE = "—"
DATA_KEYS = ("data.", "tokenizer", "run.seed", "train.global_batch", "train.batch_ramp")
"""Config keys that select the samples of a step."""
OF_HARDWARE = ("versions.", "machine.", "python", "manta")
"""Keys of the manifest that may explain another rounding."""


def compare(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the comparison as JSON has it. Each run is compared with the first. Raises InputError if there is no second."""
    if len(runs) < 2:
        raise InputError("RUN: expected two runs or more, got one. Name another one.")
    configs = [{key: value for key, value, _ in config_rows(run.config) if key != "run.dir"} for run in runs]
    achieved = [results(run) for run in runs]
    return {
        "runs": [{"run": run.name, "state": run.state, "step": run.lines[-1]["step"] if run.lines else 0} for run in runs],
        "config": _differences(configs),
        "results": {key: [one.get(key, NONE) for one in achieved] for key in dict.fromkeys(key for one in achieved for key in one)},
        "divergence": [divergence(runs[0], run) for run in runs[1:]],
    }


def divergence(first: RunRecord, other: RunRecord) -> dict[str, Any]:
    """Return the first step at which two runs differ, and whether their data, their configs or arithmetic are the cause."""
    lines = {line["step"]: line for line in other.lines}
    pairs = [(line, lines[line["step"]]) for line in first.lines if line["step"] in lines]
    found = {"run": other.name, "steps": len(pairs), "step": None, "cause": None, "differs": []}
    if not pairs:
        return found | {"text": "no step that both have logged"}
    keys = ["data/digest", *curve_names(first.lines)]
    keys = [key for key in keys if key in {"data/digest", "learning_rate", "grad_norm"} or key.startswith(("train/", "eval/"))]
    at = next((pair for pair in pairs if _differing(keys, *pair)), None)
    if at is None:
        counted = f"bitwise equal in all {len(pairs):,} steps that both have logged, {pairs[0][0]['step']:,} to {pairs[-1][0]['step']:,}"
        return found | {"text": counted}
    cause, reasons = _cause(first, other, *at)
    differs = _differing(keys, *at)
    before = f"bitwise equal before, in {pairs.index(at):,} steps" if pairs.index(at) else "the first that both have logged"
    shown = ", ".join(f"{key} {at[0].get(key)} and {at[1].get(key)}" for key in differs if key != "data/digest") or "other samples"
    text = f"from step {at[0]['step']:,} on ({before}): {shown}. Cause: {cause}: {reasons}"
    return found | {"step": at[0]["step"], "cause": cause, "differs": differs, "text": text}


def _cause(first: RunRecord, other: RunRecord, line: Line, other_line: Line) -> tuple[str, str]:
    """Return data, config or arithmetic, and what explains it."""
    identities = [{key: str(value) for key, value in run.config.identity().items()} for run in (first, other)]
    changed = [key for key in dict.fromkeys([*identities[0], *identities[1]]) if identities[0].get(key) != identities[1].get(key)]
    manifests = [manifest_rows(run.manifest) for run in (first, other)]
    if line["data/digest"] != other_line["data/digest"]:
        selecting = [key for key in changed if key.startswith(DATA_KEYS)]
        skipped = ["data.skip"] if first.config.data.skip != other.config.data.skip else []
        corpora = [manifest.get("corpus.fingerprint", "") for manifest in manifests]
        corpus = [f"the corpus ({corpora[0]} and {corpora[1]})"] if corpora[0] != corpora[1] else []
        return "data", f"the step reads other samples; {_listed([*selecting, *skipped, *corpus]) or 'the configs and corpora are the same'}"
    if line.get("learning_rate") != other_line.get("learning_rate"):
        changed += [key for key in ("train.steps", "schedule.steps") if _value(first, key) != _value(other, key)]
    starts = [manifest.get("start_from") for manifest in manifests]
    if changed or starts[0] != starts[1]:
        return "config", _listed(changed or ["run.start_from"])
    keys = ["world_size", "layout", "sequence_length", "global_batch"]
    explained = [f"{key} {line.get(key)} and {other_line.get(key)}" for key in keys if line.get(key) != other_line.get(key)]
    configs = [
        {key: value for key, value, _ in config_rows(run.config) if key.startswith(("train.", "parallel."))} for run in (first, other)
    ]
    versions = [{key: value for key, value in manifest.items() if key.startswith(OF_HARDWARE)} for manifest in manifests]
    explained += [f"{key} {values[0]} and {values[1]}" for key, values in (_differences(configs) | _differences(versions)).items()]
    same = f"layout, precision ({first.config.precision}), versions and machine are the same"
    return "arithmetic", _listed(explained, be=False) or same


def _listed(names: Sequence[str], *, be: bool = True) -> str:
    return (", ".join(names) + (" differs" if len(names) == 1 else " differ") * be) if names else ""


def _value(run: RunRecord, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(run.config, section), name)


def _differing(keys: Sequence[str], line: Line, other: Line) -> list[str]:
    """Return the keys with other values. One that only one of the lines has says nothing: they may be evaluated at other steps."""
    return [key for key in keys if key in line and key in other and line[key] != other[key]]


def _differences(all_values: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    rows = {key: [values.get(key, NONE) for values in all_values] for key in dict.fromkeys(key for values in all_values for key in values)}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def show(report: dict[str, Any]) -> None:
    """Print the comparison."""
    out, names = console(), [run["run"] for run in report["runs"]]
    for title, rows in (("config differences", report["config"]), ("results", report["results"])):
        rule(out, title)
        table = plain_table(Column("", overflow="fold"), *(Column(name, overflow="fold") for name in names))
        for key, values in rows.items():
            table.add_row(key, *values)
        out.print(table if rows else "none")
    rule(out, "where they diverge")
    for one in report["divergence"]:
        out.print(f"{one['run']} against {names[0]}: {one['text']}")
