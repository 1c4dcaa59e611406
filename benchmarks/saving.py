"""Measure saves and loads against torch and DeepSpeed: one process, the same state, the same disk, in alternating rounds.

    python benchmarks/saving.py [--directory DIR] [--width 768] [--rounds 5]

A save ends once its files are synced to the disk, also torch's and DeepSpeed's, which do not sync them.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", CUDA_VISIBLE_DEVICES="")

import torch
import xxhash

from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.engine_state import engine_progress, logical_shapes, logical_state
from manta.trainer.checkpoint.manifest import BLOCK, Checkpoint, name_of_step, to_bytes
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.storage import open_backend
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.config.model import ModelConfig
from manta.trainer.config.sections import OptimizerConfig, ParallelConfig, TrainConfig
from manta.trainer.dataloader.batch import Batch
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.model.build import build_model

LENGTH, VOCABULARY = 128, 8192
GOALS = {"blocking save / torch.save": 1.2, "load / torch.load": 1.2, "stall / step": 1.0, "hashes and manifest / save": 0.1}
GOALS |= {"hashes / torch.load": 0.1, "memory of a load / share": 1.1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="Parent of the directory to save to. Default: the system's temporary directory.")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only-load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_load:
        return print_load_memory(arguments.only_load)
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="saving-") as scratch:
        return compare(Path(scratch), width=arguments.width, layers=arguments.layers, rounds=arguments.rounds)


class Comparison:
    """One engine, with its state saved and loaded in each way."""

    def __init__(self, scratch: Path, *, width: int, layers: int) -> None:
        world = World.from_environment()
        world.join()
        model = build_model(ModelConfig(layers=layers, width=width, heads=width // 64), vocabulary=VOCABULARY, sequence_length=LENGTH)
        model.initialize(1)
        layout = layout_for(TrainConfig(steps=1, global_batch=1, micro_batch=1), ParallelConfig(), 1)
        self.engine = Engine(model, mesh=world.mesh(layout), optimizer=OptimizerConfig(), precision="bf16")
        tokens, positions = torch.randint(0, VOCABULARY, (1, LENGTH + 1)), torch.arange(LENGTH)[None]
        keys = torch.arange(1)
        self.batch = Batch(
            tokens=tokens[:, :-1], targets=tokens[:, 1:], positions=positions, documents=torch.zeros_like(positions), keys=keys
        )
        self.step()
        self.tensors = {key: view for key, held in logical_state(self.engine).items() for _, view in held.views}
        self.shapes = logical_shapes(self.engine)
        self.torch_file, self.deepspeed_directory, self.backend = (
            scratch / "torch.pt",
            scratch / "deepspeed",
            open_backend(scratch / "ours"),
        )
        self.blocking = CheckpointWriter(self.backend, identity={}, attempt=0)
        self.asynchronous = CheckpointWriter(self.backend, identity={}, attempt=0, asynchronous=True)
        self.seconds: dict[str, list[float]] = {}

    @property
    def bytes(self) -> int:
        return sum(view.nbytes for view in self.tensors.values())

    def timed(self, name: str, do: Callable[[], object]) -> None:
        start = time.perf_counter()
        do()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def round(self, number: int) -> None:
        progress = engine_progress(self.engine, step=number, samples_consumed=number)
        self.timed("step", self.step)
        self.timed("torch.save", self.save_by_torch)
        self.timed("DeepSpeed's save", self.save_by_deepspeed)
        self.timed("blocking save", lambda: self.blocking.save(logical_state(self.engine), progress))
        self.backend.delete(name_of_step(number))
        self.timed("stall", lambda: self.asynchronous.save(logical_state(self.engine), progress, wait=False))
        self.timed("step during a save", self.step)
        self.asynchronous.finish()
        checkpoint = catalog.read_manifest(self.backend, name_of_step(number))
        self.timed("torch.load", self.load_by_torch)
        self.timed("DeepSpeed's load", lambda: self.engine.deepspeed.load_checkpoint(str(self.deepspeed_directory), tag="x"))
        for _ in range(5):  # alternating: their difference is the cost of hashes
            self.timed("load", lambda: self.load(checkpoint, "full"))
            self.timed("load without hashes", lambda: self.load(checkpoint, "sizes"))
        self.timed("hashes and manifest", lambda: (hash_blocks(self.tensors), to_bytes(checkpoint)))

    def step(self) -> None:
        self.engine.step([self.batch], learning_rate=1e-4)

    def save_by_torch(self) -> None:
        torch.save(self.tensors, self.torch_file)
        sync(self.torch_file)

    def save_by_deepspeed(self) -> None:
        self.engine.deepspeed.save_checkpoint(str(self.deepspeed_directory), tag="x")
        for file in self.deepspeed_directory.rglob("*.pt"):
            sync(file)

    def load_by_torch(self) -> None:
        for key, tensor in torch.load(self.torch_file).items():
            self.tensors[key].copy_(tensor)

    def load(self, checkpoint: Checkpoint, verify: catalog.Verification) -> None:
        catalog.load(self.backend, checkpoint, logical_state(self.engine), self.shapes, verify=verify)


def compare(scratch: Path, *, width: int, layers: int, rounds: int) -> int:
    comparison = Comparison(scratch, width=width, layers=layers)
    print(f"{comparison.bytes / 1e6:,.0f} MB of masters and AdamW's moments, in {scratch}")
    for number in range(rounds + 1):
        comparison.round(number)
        if number < rounds:
            comparison.backend.delete(name_of_step(number))
            shutil.rmtree(comparison.deepspeed_directory)
    seconds = {name: times[len(times) // (rounds + 1) :] for name, times in comparison.seconds.items()}  # the first round warms up
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        print(f"  {name:26}{medians[name]:8.3f} s   ({min(times):.3f} to {max(times):.3f})")
    loaded = subprocess.run([sys.executable, __file__, "--only-load", comparison.backend.path], capture_output=True, text=True, check=True)
    ratios = {
        "blocking save / torch.save": medians["blocking save"] / medians["torch.save"],
        "load / torch.load": medians["load"] / medians["torch.load"],
        "stall / step": medians["stall"] / medians["step"],
        "hashes and manifest / save": medians["hashes and manifest"] / medians["blocking save"],
        "hashes / torch.load": (medians["load"] - medians["load without hashes"]) / medians["torch.load"],
        "memory of a load / share": json.loads(loaded.stdout),
    }
    print(f"  {'hashes / load':30}{1 - medians['load without hashes'] / medians['load']:6.2f}   of a load that is this much faster")
    for name, ratio in ratios.items():
        print(f"  {name:30}{ratio:6.2f}   goal: at most {GOALS[name]}")
    missed = [name for name, ratio in ratios.items() if ratio > GOALS[name]]
    print(f"missed: {', '.join(missed)}" if missed else "met")
    return len(missed) > 0


def hash_blocks(tensors: dict[str, torch.Tensor]) -> None:
    """Hash block by block, as saves and loads do."""
    for tensor in tensors.values():
        flat = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        for start in range(0, len(flat), BLOCK):
            xxhash.xxh3_64(flat[start : start + BLOCK]).hexdigest()


def sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def print_load_memory(directory: Path) -> int:
    """Print the memory that a load takes, as a share of the bytes that it loads."""
    backend = open_backend(directory)
    checkpoint = catalog.read_manifest(backend, backend.names()[0])
    tensors = {key: torch.empty(stored.shape) for key, stored in checkpoint.tensors.items()}  # not touched yet, so not in memory
    before = peak_memory(reset=True)
    state = {key: TensorViews.from_whole(tensor) for key, tensor in tensors.items()}
    catalog.load(backend, checkpoint, state, checkpoint.shapes, verify="full")
    print(json.dumps((peak_memory() - before) / sum(tensor.nbytes for tensor in tensors.values())))
    return 0


def peak_memory(*, reset: bool = False) -> int:
    """Return this process's peak memory in bytes, since its start or the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
