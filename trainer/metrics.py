"""metrics.jsonl: one JSON object a logged step. After a restart a step may stand again: the later attempt's line is the true one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]
LONGEST_LINE = 1 << 16  # bytes
AUXILIARY = frozenset({"z_loss", "balance", "router_z"})  # terms that are minimised too, and are no part of what is told as the loss


class MetricsLog:
    """Appends lines; one process writes at a time."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)  # by lines: a reader, and whoever kills us, finds whole ones
        self._file.truncate(end_of_lines(path))

    def write(self, line: Line) -> None:
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


def parse(text: str) -> list[Line]:
    """The lines of a part of the file that begins and ends with whole ones."""
    return [json.loads(line) for line in text.splitlines()]


def read_metrics(path: Path) -> list[Line]:
    """One line a step, in order: a run that went back to a step takes back what it wrote from there on. A torn last line is left out."""
    text = path.read_text() if path.exists() else ""
    lines: list[Line] = []
    for line in parse(text[: text.rfind("\n") + 1]):
        while lines and lines[-1]["step"] >= line["step"]:
            lines.pop()
        lines.append(line)
    return lines


def describe(line: Line) -> str:
    """What people want to know of a step."""
    parts = [f"loss {loss_in_words(line['train/loss'], terms(line, 'train'))}", f"{line['tokens_per_second']:,.0f} tokens/s"]
    if line.get("mfu") is not None:
        parts.append(f"MFU {line['mfu']:.1%}")
    if line.get("skipped"):
        parts.append(f"gradients overflowed, nothing learned, loss scale now {line['loss_scale']:g}")
    if line.get("checkpoint/failures"):
        parts.append(f"COULD NOT SAVE, {line['checkpoint/failures']} in a row: logs/ says why")
    if "eval/loss" in line:
        parts.append(f"validation loss {loss_in_words(line['eval/loss'], terms(line, 'eval'))}")
    return "  ".join(parts)


def terms(line: Line, split: str) -> dict[str, float]:
    """What the loss of `train` or `eval` is the sum of, where it is of several."""
    named = {key.removeprefix(f"{split}/"): value for key, value in line.items() if key.startswith(f"{split}/")}
    return {name: value for name, value in named.items() if name not in {"loss"} | AUXILIARY}


def loss_in_words(loss: float, terms: Mapping[str, float]) -> str:
    told = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in terms.items())
    return f"{loss:.4f}" + (f" ({told})" if told else "")


def duration(seconds: float) -> str:
    """As people say it: 9s, 4m10s, 3h05m, 2d04h."""
    whole = round(seconds)
    for size, unit, below, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // below:02d}{part}"
    return f"{whole}s"


def end_of_lines(path: Path) -> int:
    """Where the last whole line ends: a rank killed in mid-write leaves half of one. Reads the end of the file alone."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        first = file.seek(max(0, size - LONGEST_LINE))
        return first + file.read().rfind(b"\n") + 1
