"""How long a run needs to start, and to come back from a killed rank. Prints a table; the corpus must be prepared.

manta prepare examples/gpt-tiny.yaml
python benchmarks/recovery.py [kills]
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manta.trainer.metrics import parse

MANTA = Path(sys.executable).with_name("manta")
WARM = 20.0  # seconds in which spares have imported everything, while training has both cores


def main(kills: int) -> int:
    run = Path(tempfile.mkdtemp()) / "run"
    start = time.time()
    command = [MANTA, "train", "examples/gpt-tiny.yaml", f"run.dir={run}", "train.steps=100000", "checkpoint.every_steps=10"]
    training = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    first = until(lambda: lines(run), training)
    print(f"manta train -> first step: {first[0]['time'] - start:.2f} s")
    noticed, resumed = [], []
    for kill in range(kills):
        time.sleep(WARM)
        attempt = of_kind(run, "attempt-started")[-1]
        victim = attempt["ranks"][kill % len(attempt["ranks"])]
        when = time.time()
        os.kill(victim["pid"], signal.SIGKILL)
        number = attempt["attempt"] + 1
        step = until(lambda number=number: [line for line in lines(run) if line["attempt"] == number], training)[0]
        noticed.append(of_kind(run, "rank-failed")[-1]["time"] - when)
        resumed.append(step["time"] - when)
        print(f"kill -9 rank {victim['rank']}: noticed after {noticed[-1]:.2f} s, next optimizer step done after {resumed[-1]:.2f} s")
    print(f"median of {kills}: noticed {statistics.median(noticed):.2f} s, next step {statistics.median(resumed):.2f} s")
    print(f"slowest: noticed {max(noticed):.2f} s, next step {max(resumed):.2f} s")
    when = time.time()
    training.terminate()
    print(f"SIGTERM -> saved, exit {training.wait()}: {time.time() - when:.2f} s")
    shutil.rmtree(run.parent)
    return 0


def until(look: Callable[[], list[dict[str, Any]]], training: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
    while not (found := look()):
        if training.poll() is not None:
            sys.exit(f"the run ended with {training.returncode}")
        time.sleep(0.01)
    return found


def lines(run: Path) -> list[dict[str, Any]]:
    """As they were written, a replayed step twice."""
    text = file.read_text() if (file := run / "metrics.jsonl").exists() else ""
    return parse(text[: text.rfind("\n") + 1])


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == kind]


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
