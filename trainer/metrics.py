"""metrics.jsonl: one JSON object per logged step. A restart may log a step again; the last line of a step is the valid one."""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

from manta.cluster.protocol import LONGEST_LINE, open_regular, read_lines

Line = dict[str, Any]
SOURCES = ("loss", "bits_per_byte")  # of evaluation: `eval/loss/NAME` and so on are a source's; `eval/NAME/loss` is a validation set's
AUXILIARY = frozenset({"z_loss", "balance", "router_z"})  # terms that are minimised as well, but excluded from the logged loss


class _Metrics(BaseModel):
    """The keys that readers of a line rely on. A line has more."""

    model_config = ConfigDict(strict=True, extra="ignore")

    step: Annotated[int, Field(ge=1, le=10**15)]
    attempt: Annotated[int, Field(ge=0, le=10**9)]
    time: Annotated[float, Field(ge=0, le=1e12)] = 0.0
    seconds: dict[str, Annotated[float, Field(ge=0, le=1e12)]] = {}
    tokens: Annotated[int, Field(ge=0)]
    loss: Annotated[float, Field(alias="train/loss")]
    validation_loss: Annotated[float, Field(alias="eval/loss")] = 0.0
    digest: Annotated[int, Field(alias="data/digest")]
    global_batch: Annotated[int, Field(ge=1, le=10**12)]
    sequence_length: Annotated[int, Field(ge=1, le=10**12)]
    step_time: Annotated[float, Field(ge=0, le=1e9)]
    tokens_per_second: float
    mfu: float | None = None
    world_size: Annotated[int, Field(ge=1, le=10**6)]
    layout: Annotated[str, Field(max_length=200)]
    skipped: bool = False
    loss_scale: float = 1.0
    failures: Annotated[int, Field(alias="checkpoint/failures")] = 0


def parse_line(text: str | bytes) -> Line:
    """Return the metrics of a line. Raises ValueError if a key is missing, or of another type, that readers rely on."""
    line = from_json(text)
    _Metrics.model_validate(line)
    return line


def parse_lines(text: str) -> list[Line]:
    """Parse a part of the file that starts and ends at line boundaries."""
    return [parse_line(line) for line in text.splitlines()]


def read_metrics(path: Path) -> list[Line]:
    """Return the valid line of each step, in order. An incomplete last line is ignored, and a damaged line is skipped and logged.

    A run that resumed at an earlier step replaces all lines from that step on. Raises OSError if the file cannot be read.
    """
    return valid_lines(read_all_metrics(path))


def valid_lines(all_lines: Iterable[Line]) -> list[Line]:
    """Return the valid line of each step, in order, of all lines."""
    lines: list[Line] = []
    for line in all_lines:
        while lines and lines[-1]["step"] >= line["step"]:
            lines.pop()
        lines.append(line)
    return lines


def read_all_metrics(path: Path) -> list[Line]:
    """Return all lines, also those of steps that a later attempt did again."""
    try:
        with open_regular(path) as file:
            return list(read_lines(file, parse_line, path=path))
    except FileNotFoundError:
        return []


def format_line(line: Line) -> str:
    """Return a step's loss, speed and problems as one line of text."""
    parts = [f"loss {format_loss(line['train/loss'], loss_terms(line, 'train'))}", f"{line['tokens_per_second']:,.0f} tokens/s"]
    if line.get("mfu") is not None:
        parts.append(f"MFU {line['mfu']:.1%}")
    if line.get("skipped"):
        parts.append(f"gradient overflow, step skipped, loss scale now {line['loss_scale']:g}")
    if line.get("checkpoint/failures"):
        parts.append(f"CHECKPOINT FAILED, {line['checkpoint/failures']} in a row: see logs/")
    if "eval/loss" in line:
        parts.append(f"validation loss {format_loss(line['eval/loss'], loss_terms(line, 'eval'))}")
    for key, value in line.items():
        if (found := re.fullmatch(r"eval/([^/]+)/loss", key)) and found[1] not in SOURCES and isinstance(value, float):
            parts.append(f"{found[1]} loss {format_loss(value, loss_terms(line, f'eval/{found[1]}'))}")
    return "  ".join(parts)


def loss_terms(line: Line, split: str) -> dict[str, float]:
    """Return what is logged beside the loss of `train` or `eval`: its terms, if there are several, and metrics; not those of sources."""
    named = {key.removeprefix(f"{split}/"): value for key, value in line.items() if key.startswith(f"{split}/")}
    hidden = {"loss", "perplexity"} | AUXILIARY
    return {name: value for name, value in named.items() if name not in hidden and "/" not in name and isinstance(value, float)}


def format_loss(loss: float, terms: Mapping[str, float]) -> str:
    details = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in terms.items())
    return f"{loss:.4f}" + (f" ({details})" if details else "")


def energy(lines: Sequence[Line]) -> dict[str, Any]:
    """Return the energy that a run has used, from all its lines: `energy_kwh`, `energy_source`, and `co2_kg` if it is known.

    Nothing if the run has not logged its energy.
    """
    found = next((line for line in reversed(lines) if is_finite(line.get("energy/kwh"))), Line())
    keys = {"energy/kwh": "energy_kwh", "energy/source": "energy_source", "energy/co2_kg": "co2_kg"}
    return {name: found[key] for key, name in keys.items() if isinstance(found.get(key), str) or is_finite(found.get(key))}


def format_energy(energy: Mapping[str, Any]) -> dict[str, str]:
    """Return what `energy` found as text: energy and CO2, with their source."""
    source = f" ({energy.get('energy_source', 'source unknown')})"
    parts = {"energy": ("energy_kwh", "kWh"), "CO2": ("co2_kg", "kg")}
    return {name: f"{energy[key]:.4g} {unit}{source}" for name, (key, unit) in parts.items() if key in energy}


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def format_duration(seconds: float) -> str:
    """Return two units at most: 9s, 4m10s, 3h05m, 2d04h."""
    whole = round(seconds)
    for size, unit, smaller_size, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller_size:02d}{smaller_unit}"
    return f"{whole}s"


def end_of_last_line(path: Path) -> int:
    """Return the offset after the last complete line. A rank killed while writing leaves an incomplete one. Reads only the file's end."""
    if not path.exists():
        return 0
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        first = file.seek(max(0, size - LONGEST_LINE))
        return first + file.read().rfind(b"\n") + 1
