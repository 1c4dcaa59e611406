"""Train once without a disturbance, and once with a killed rank and three changes of layout. Draws both into docs/images/elastic.svg.

python benchmarks/elastic.py [--directory DIRECTORY]

Exits with 1 if a loss differs by more than 1e-5. Takes about six minutes on two cores. Complete runs in DIRECTORY are not repeated.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from manta.trainer.metrics import read_metrics

HERE = Path(__file__).parent
IMAGE = HERE.parent / "docs/images/elastic.svg"
MANTA = Path(sys.executable).with_name("manta")
EXAMPLE = HERE.parent / "examples/gpt-tiny.yaml"
STEPS = 240
KILL_AT = 47  # between two checkpoints, so that steps are recomputed
BOUND = 1e-5
SETTINGS = (f"train.steps={STEPS}", "checkpoint.every_steps=20", "evaluate.every_steps=1000", "train.micro_batch=8")
SEGMENTS = (  # the step to stop at, settings, label, color
    (80, ("cluster.ranks_per_node=2",), "2 ranks, ZeRO 1", "#1f77b4"),
    (130, ("cluster.ranks_per_node=1",), "1 rank", "#d95f02"),
    (180, ("cluster.ranks_per_node=2", "parallel.tensor=2"), "2 ranks, tensor parallel", "#1b9e77"),
    (STEPS, ("cluster.ranks_per_node=2", "parallel.tensor=1", "parallel.zero=3"), "2 ranks, ZeRO 3", "#7570b3"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "manta-elastic")
    directory: Path = parser.parse_args().directory.absolute()
    undisturbed, elastic = directory / "undisturbed", directory / "elastic"
    if not is_complete(undisturbed):
        subprocess.run([*command("train", undisturbed), *SEGMENTS[0][1]], check=True)
    if not is_complete(elastic):
        train_elastic(elastic)
    expected, actual = losses(undisturbed), losses(elastic)
    differences = [abs(actual[step] - expected[step]) for step in sorted(expected)]
    starts = [1, *first_steps_of_layouts(elastic)]
    draw(expected, actual, differences, starts)
    print(f"largest difference of a loss: {max(differences):.1e}; {sum(d == 0 for d in differences)} of {STEPS} are bitwise identical")
    print(f"wrote {IMAGE}")
    return int(max(differences) > BOUND)


def command(verb: str, run: Path) -> list[str | Path]:
    return [MANTA, verb, EXAMPLE, f"run.dir={run}", *SETTINGS] if verb == "train" else [MANTA, verb, run]


def is_complete(run: Path) -> bool:
    return len(losses(run)) == STEPS


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in read_metrics(run / "metrics.jsonl")}


def first_steps_of_layouts(run: Path) -> list[int]:
    """Return the first step under each new layout."""
    lines = read_metrics(run / "metrics.jsonl")
    return [line["step"] for before, line in pairwise(lines) if line["layout"] != before["layout"]]


def train_elastic(run: Path) -> None:
    verb = "train"
    for stop_at, settings, _, _ in SEGMENTS:
        process = subprocess.Popen([*command(verb, run), *settings])
        if verb == "train":
            wait_for_step(process, run, KILL_AT)
            started = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines() if "attempt-started" in line]
            os.kill(started[-1]["ranks"][1]["pid"], signal.SIGKILL)
        if stop_at < STEPS:
            wait_for_step(process, run, stop_at)
            process.send_signal(signal.SIGTERM)
        expected = 75 if stop_at < STEPS else 0
        if process.wait() != expected:
            raise SystemExit(f"manta: expected exit code {expected}, got {process.returncode}. See {run}/logs.")
        verb = "resume"


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    while max(losses(run), default=0) < step:
        if process.poll() is not None:
            raise SystemExit(f"manta: expected step {step}, but the run ended with exit code {process.returncode}. See {run}/logs.")
        time.sleep(0.02)


def draw(expected: dict[int, float], actual: dict[int, float], differences: list[float], starts: list[int]) -> None:
    mpl.rcParams.update({"svg.hashsalt": "manta", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10})
    figure, (above, below) = plt.subplots(2, figsize=(9, 4.8), sharex=True, height_ratios=(2.4, 1), layout="constrained")
    figure.patch.set_facecolor("white")
    steps = sorted(expected)
    above.plot(steps, [expected[step] for step in steps], color="#c8c8c8", linewidth=7, label="undisturbed run", solid_capstyle="round")
    for start, end, (_, _, label, color) in zip(starts, [*starts[1:], STEPS + 1], SEGMENTS, strict=True):
        part = range(start, end)
        above.plot(part, [actual[step] for step in part], color=color, linewidth=1.8, label=label)
        below.plot(part, [max(differences[step - 1], 1e-9) for step in part], ".", color=color, markersize=3)
    mark(above, KILL_AT, "a rank is\nkilled")
    for start, text in zip(starts[1:], ("stopped,\nresumed on 1 rank", "tensor parallel", "ZeRO 3"), strict=True):
        mark(above, start, text)
    above.set_ylabel("training loss")
    above.legend(loc="upper right", frameon=False, ncols=2)
    below.set_yscale("log")
    below.set_ylim(5e-10, 1e-4)
    below.set_yticks([1e-9, 1e-7, 1e-5], ["bitwise\nequal", "1e-7", "1e-5"])
    below.axhline(BOUND, color="#888888", linewidth=0.8, linestyle="--")
    below.set_ylabel("difference")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, metadata={"Date": None})


def mark(axes: Axes, step: int, text: str) -> None:
    axes.axvline(step, color="#888888", linewidth=0.8, linestyle=":")
    axes.annotate(text, (step, 0.02), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points", fontsize=8)


if __name__ == "__main__":
    sys.exit(main())
