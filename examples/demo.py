"""The main job, end to end: prepare a corpus, train on it, kill a rank on the way, and see the run come back to the same losses.

make demo
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from manta.data.sampling.samples import Samples
from manta.trainer.loop import validation_samples
from manta.trainer.metrics import Line, parse_lines, read_metrics
from manta.trainer.run_directory import RunDirectory

CONFIG = "examples/gpt-tiny.yaml"
RUN = Path("runs/demo")
MANTA = Path(sys.executable).with_name("manta")
KILL_AT = 0.55  # of the way, and between two checkpoints, so that some steps are done again
out = Console(highlight=False, soft_wrap=True)


def main() -> int:
    out.rule("1. A corpus: the source and documentation of this Python")
    run("prepare", CONFIG)

    out.rule("2. Training, with a rank killed on the way")
    shutil.rmtree(RUN, ignore_errors=True)
    command = [MANTA, "train", CONFIG, f"run.dir={RUN}"]
    out.print(f"$ manta train {CONFIG} run.dir={RUN}", style="bold")
    training = subprocess.Popen(command)
    killed_at, when = kill_a_rank(training)
    if code := training.wait():
        return code

    home = RunDirectory(RUN.absolute())
    out.rule("3. What came of it")
    lines = read_metrics(home.metrics_file)
    out.print(curve(lines))
    tell_recovery(home, killed_at, when)
    tell_loss(home, lines)

    out.rule("4. Text by the model")
    run("generate", str(RUN), "def read(self, ", "--tokens", "96", "--top-p", "0.9")

    out.rule("5. Where everything lies")
    out.print(f"""{RUN}/config.yaml      the whole config, every default written out
{RUN}/metrics.jsonl    a line a step          {RUN}/events.jsonl   every transition
{RUN}/checkpoints/     the newest two         {RUN}/logs/          a file a rank and attempt

Next:
  manta status {RUN}
  manta resume {RUN} train.steps={2 * lines[-1]["step"]} cluster.ranks_per_node=1    # longer, on one rank
  manta export {RUN}                                             # for transformers""")
    return 0


def run(*arguments: str) -> None:
    out.print(f"$ manta {' '.join(repr(a) if ' ' in a else a for a in arguments)}", style="bold")
    subprocess.run([MANTA, *arguments], check=True)


def kill_a_rank(training: subprocess.Popen[bytes]) -> tuple[int, float]:
    """Waits for the middle of the run, then kills rank 1 (rank 0 of one). Gives the last step on record, and when."""
    home = RunDirectory(RUN.absolute())
    step, wanted = 0, 0
    while step < wanted or not wanted:
        if training.poll() is not None:
            sys.exit(training.returncode or "the run ended before a rank could be killed")
        time.sleep(0.05)
        if home.metrics_file.exists() and (lines := read_metrics(home.metrics_file)):
            config = home.config()
            every = config.checkpoint.every_steps
            wanted = int(config.train.steps * KILL_AT) // every * every + every // 3
            step = lines[-1]["step"]
    started = [event for event in map(json.loads, home.events_file.read_text().splitlines()) if event["event"] == "attempt-started"]
    rank = started[-1]["ranks"][-1]
    when = time.time()
    os.kill(rank["pid"], signal.SIGKILL)
    out.print(f"kill -9 {rank['pid']}: rank {rank['rank']} is dead, after step {step}", style="bold red")
    return step, when


def tell_recovery(home: RunDirectory, killed_at: int, when: float) -> None:
    events = [json.loads(line) for line in home.events_file.read_text().splitlines()]
    failed = next(event for event in events if event["event"] == "rank-failed")
    every_line = parse_lines(home.metrics_file.read_text())
    first, second = ([line for line in every_line if line["attempt"] == attempt] for attempt in (1, 2))
    out.print(f"recovery: noticed after {failed['time'] - when:.2f} s, the next optimizer step done after {second[0]['time'] - when:.2f} s")
    again = {line["step"]: line for line in second}
    twice = [(line["train/loss"], again[line["step"]]["train/loss"]) for line in first if line["step"] in again]
    same = sum(a == b for a, b in twice)
    out.print(f"killed after step {killed_at}, went on from step {second[0]['step'] - 1}")
    out.print(f"{same} of the {len(twice)} losses that were done twice are the same, bit by bit")
    if same < len(twice):
        sys.exit("the run did not come back to the same losses")


def tell_loss(home: RunDirectory, lines: list[Line]) -> None:
    config = home.config()
    samples = Samples(home.prepared(), config.data, config.tokenizer, seed=config.run.seed)
    entropy = samples.validation_unigram_entropy(np.arange(validation_samples(config, samples)))
    loss = lines[-1]["eval/loss"]
    out.print(
        f"validation loss {loss:.3f} nats a token; the same tokens' unigram entropy {entropy:.3f}: {entropy - loss:.3f} below it",
        style="bold",
    )


def curve(lines: list[Line], width: int = 72, height: int = 10) -> str:
    """The training loss as a picture: each column the mean of its steps."""
    losses = [float(np.mean(part)) for part in np.array_split([line["train/loss"] for line in lines], min(width, len(lines)))]
    low, high = min(losses), max(losses)
    rows = [round((high - loss) / (high - low or 1) * (height - 1)) for loss in losses]
    picture = ["".join("●" if row == level else " " for row in rows) for level in range(height)]
    labels = [f"{high - (high - low) * level / (height - 1):6.2f} ┤" for level in range(height)]
    end = f"step {lines[-1]['step']}"
    axis = f"{'':7}└{'─' * len(losses)}\n{'':8}step 1{end:>{len(losses) - 6}}"
    return "\n".join(label + row for label, row in zip(labels, picture, strict=True)) + "\n" + axis


if __name__ == "__main__":
    sys.exit(main())
