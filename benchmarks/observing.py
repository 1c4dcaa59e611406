"""What it costs to watch a run: CPU-seconds of the ranks with everything on, against everything off, and the tracker's share of a core.

    python benchmarks/observing.py [--pairs 20] [--steps 100]

Two ranks train blocks of steps, in pairs: with a line of metrics for each step, losses by source, the model's health, the guard and energy
as often as by default, and without all of it. Each pair starts with the other one. The tracker then follows the run's files at ten steps a
second.
"""

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import psutil
import torch
import yaml
from torch import multiprocessing

from manta.cluster.line_file import LineFile
from manta.cluster.protocol import HeartbeatWriter
from manta.data.live.live_samples import open_samples
from manta.trainer.config.training import TrainingConfig
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.guard.response import SpikeGuard
from manta.trainer.loop import Loop
from manta.trainer.model.build import build_model
from manta.trainer.run_directory import RunDirectory
from manta.trainer.signals import StopRequest

RANKS, RATE = 2, 10.0  # RATE: steps a second that the tracker follows
RATIOS = "ratios.json"
MOST_COST, MOST_SHARE = 0.02, 0.03  # of the ranks' CPU-seconds, and of a core
START, WATCHED = 10.0, 30.0  # seconds of the tracker before, and while it is measured
OFF = {"every_steps": 2**40, "sources_every_steps": 0, "health_every_steps": 0, "watts": None}
CONFIG: dict[str, Any] = {
    "data": {"sources": {"code": "stdlib:", "words": "documents/*.txt"}, "sequence_length": 128, "validation": 0.0},
    "tokenizer": {"vocabulary": 1024},
    "model": {"preset": "llama-tiny", "layers": 4, "width": 256, "heads": 4, "kv_heads": 4, "mlp_width": 512},
    "train": {"steps": 2, "global_batch": 8, "micro_batch": 4},
    "evaluate": {"every_steps": 10**6},
    "guard": {"replica_check_every_steps": 0},
    "track": {"tensorboard": True, "prometheus": 9471, "watts": 30.0},
    "precision": "fp32",
    "cluster": {"ranks_per_node": RANKS, "hot_standby": False},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100, help="steps of a block; health and losses by source are measured in one of them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="observing-") as scratch:
        run_dir = start_run(Path(scratch))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ.update(WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]), OMP_NUM_THREADS="1")
        multiprocessing.spawn(rank, (run_dir.path, arguments.pairs, arguments.steps), nprocs=RANKS)
        ratios = json.loads((run_dir.path / RATIOS).read_text())
        share = tracker_share(run_dir)
    lowest, *_, highest = statistics.quantiles(ratios, n=10)
    cost = statistics.median(ratios)
    print(f"ranks, {len(ratios)} pairs of {arguments.steps} steps: {cost:+.2%} CPU-seconds (deciles {lowest:+.2%} to {highest:+.2%})")
    print(f"tracker (TensorBoard and Prometheus, {RATE:g} steps a second): {share:.2%} of a core")
    return int(cost > MOST_COST or share > MOST_SHARE)


def start_run(directory: Path) -> RunDirectory:
    """Make a run of two steps, for its corpus and its files."""
    (directory / "documents").mkdir()
    for file in sorted(Path(os.__file__).parent.glob("[a-c]*.py")):
        (directory / "documents" / f"{file.stem}.txt").write_text(file.read_text())
    config = directory / "config.yaml"
    config.write_text(yaml.safe_dump({"run": {"dir": "run"}, **CONFIG}))
    subprocess.run([sys.executable, "-m", "manta.launch", "train", str(config)], cwd=directory, check=True, stdout=subprocess.DEVNULL)
    return RunDirectory(directory / "run")


class NotSaved:
    """Replaces the checkpoint writer: no block is saved."""

    outcome, is_busy = None, False

    def finish(self) -> None:
        pass

    def save(self, *_: object, **__: object) -> None:
        pass


class NoGuard:
    """Replaces the guard in blocks without it."""

    def __init__(self, guard: SpikeGuard) -> None:
        self.detector = guard.detector

    def rejects(self, *_: object) -> bool:
        return False

    def end_step(self, *_: object) -> None:
        pass


def rank(number: int, path: Path, pairs: int, steps: int) -> None:
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number))
    torch.set_num_threads(1)
    world, run_dir = World.from_environment(), RunDirectory(path)
    world.join()
    config = run_dir.config()
    samples = open_samples(run_dir.prepared(), config.data, config.tokenizer, seed=1, held_out=1)
    model = build_model(config.model, vocabulary=samples.tokenizer_vocabulary, sequence_length=config.data.sequence_length)
    model.initialize(1)
    mesh = world.mesh(layout_for(config.train, config.parallel, RANKS))
    engine = Engine(model, mesh=mesh, optimizer=config.optimizer, precision=config.precision)
    guard = SpikeGuard(config.guard, samples, engine, run_dir.spikes_file, HeartbeatWriter(None), attempt=1)
    metrics = LineFile(run_dir.metrics_file) if number == 0 else None
    shared: Any = {"world": world, "samples": samples, "engine": engine, "run_dir": run_dir, "saver": NotSaved(), "metrics": metrics}
    shared |= {"heartbeat": HeartbeatWriter(None), "stop": StopRequest(), "flops_per_token": {config.data.sequence_length: 1e7}}

    def cpu_seconds(step: int, *, on: bool) -> float:
        """Train a block of steps from `step`. Return its CPU-seconds, over both ranks."""
        changed = {"train": config.train.model_copy(update={"steps": step + steps})}
        if not on:
            changed["track"] = config.track.model_copy(update=OFF)
        block: TrainingConfig = config.model_copy(update=changed)
        loop = Loop(config=block, guard=guard if on else NoGuard(guard), **shared)
        before = used()
        loop.run(step)
        return world.sum([used() - before])[0]

    cpu_seconds(0, on=True)
    ratios, step = list[float](), steps
    for pair in range(pairs):
        found = dict[bool, float]()
        for on in (True, False) if pair % 2 else (False, True):
            found[on] = cpu_seconds(step, on=on)
            step += steps
        ratios.append(found[True] / found[False] - 1)
        if number == 0:
            (path / RATIOS).write_text(json.dumps(ratios))


def used() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def tracker_share(run_dir: RunDirectory) -> float:
    """Return the share of a core that the tracker takes while a step is logged ten times a second."""
    line = json.loads(run_dir.metrics_file.read_text().splitlines()[-1])
    with run_dir.lock():
        tracker = subprocess.Popen(
            [sys.executable, "-P", "-m", "manta.launch.track", str(run_dir.path)], stdin=subprocess.PIPE
        )  # its end ends it
        file, process, started, before = LineFile(run_dir.metrics_file), psutil.Process(tracker.pid), time.monotonic(), 0.0
        for number in range(int((START + WATCHED) * RATE)):
            if number == int(START * RATE):
                before = sum(process.cpu_times()[:2])
            line["step"], line["time"] = line["step"] + 1, time.time()
            file.write(json.dumps(line).encode())
            time.sleep(max(0.0, started + (number + 1) / RATE - time.monotonic()))
        share = (sum(process.cpu_times()[:2]) - before) / WATCHED
        assert tracker.poll() is None
        tracker.terminate()
        tracker.wait(10)
    return share


if __name__ == "__main__":
    sys.exit(main())
