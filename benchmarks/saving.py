"""What saving and loading cost, beside torch and DeepSpeed doing the same: one process, the same state, the same disk, round by round.

    python benchmarks/saving.py [--directory DIR] [--width 768] [--rounds 5]

Every file is synced to the disk before a save counts as done, also torch's and DeepSpeed's, which do not do so by themselves.
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
from manta.trainer.checkpoint.backend import open_backend
from manta.trainer.checkpoint.engine_state import engine_progress, logical_shapes, logical_state
from manta.trainer.checkpoint.manifest import BLOCK, Checkpoint, name_of_step, to_bytes
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.config.model import ModelConfig
from manta.trainer.config.sections import OptimizerConfig, ParallelConfig, TrainConfig
from manta.trainer.dataloader.batch import Batch
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.model.build import build_model

LENGTH, VOCABULARY = 128, 8192
WANTED = {"blocking save / torch.save": 1.2, "load / torch.load": 1.2, "stall / step": 1.0, "hashes and manifest / save": 0.1}
WANTED |= {"hashes / torch.load": 0.1, "memory of a load / share": 1.1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="Where to save; a temporary one where not given.")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only-load", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only_load:
        return tell_memory(given.only_load)
    with tempfile.TemporaryDirectory(dir=given.directory, prefix="saving-") as scratch:
        return compare(Path(scratch), width=given.width, layers=given.layers, rounds=given.rounds)


class Comparison:
    """One engine, and what it takes to save and load its state in each way."""

    def __init__(self, scratch: Path, *, width: int, layers: int) -> None:
        world = World.from_environment()
        world.join()
        model = build_model(ModelConfig(layers=layers, width=width, heads=width // 64), vocabulary=VOCABULARY, sequence_length=LENGTH)
        model.initialize(1)
        layout = layout_for(TrainConfig(steps=1, global_batch=1, micro_batch=1), ParallelConfig(), 1)
        self.engine = Engine(model, mesh=world.mesh(layout), optimizer=OptimizerConfig(), precision="bf16")
        text, places = torch.randint(0, VOCABULARY, (1, LENGTH + 1)), torch.arange(LENGTH)[None]
        keys = torch.arange(1)
        self.batch = Batch(tokens=text[:, :-1], targets=text[:, 1:], positions=places, documents=torch.zeros_like(places), keys=keys)
        self.step()
        self.wholes = {key: view for key, pieces in logical_state(self.engine).items() for _, view in pieces.views}
        self.shapes = logical_shapes(self.engine)
        self.torchs, self.deepspeeds, self.where = scratch / "torch.pt", scratch / "deepspeed", open_backend(scratch / "ours")
        self.blocking = CheckpointWriter(self.where, identity={}, attempt=0)
        self.behind = CheckpointWriter(self.where, identity={}, attempt=0, asynchronous=True)
        self.seconds: dict[str, list[float]] = {}

    @property
    def bytes(self) -> int:
        return sum(view.nbytes for view in self.wholes.values())

    def timed(self, name: str, do: Callable[[], object]) -> None:
        begun = time.perf_counter()
        do()
        self.seconds.setdefault(name, []).append(time.perf_counter() - begun)

    def round(self, number: int) -> None:
        come = engine_progress(self.engine, step=number, samples_consumed=number)
        self.timed("step", self.step)
        self.timed("torch.save", self.save_by_torch)
        self.timed("DeepSpeed's save", self.save_by_deepspeed)
        self.timed("blocking save", lambda: self.blocking.save(logical_state(self.engine), come))
        self.where.delete(name_of_step(number))
        self.timed("stall", lambda: self.behind.save(logical_state(self.engine), come, wait=False))
        self.timed("step while it is written", self.step)
        self.behind.finish()
        checkpoint = catalog.read_manifest(self.where, name_of_step(number))
        self.timed("torch.load", self.load_by_torch)
        self.timed("DeepSpeed's load", lambda: self.engine.deepspeed.load_checkpoint(str(self.deepspeeds), tag="x"))
        for _ in range(5):  # in turn: their difference is what hashes cost a load
            self.timed("load", lambda: self.load(checkpoint, "full"))
            self.timed("load by sizes alone", lambda: self.load(checkpoint, "sizes"))
        self.timed("hashes and manifest", lambda: (hash_blocks(self.wholes), to_bytes(checkpoint)))

    def step(self) -> None:
        self.engine.step([self.batch], learning_rate=1e-4)

    def save_by_torch(self) -> None:
        torch.save(self.wholes, self.torchs)
        synced(self.torchs)

    def save_by_deepspeed(self) -> None:
        self.engine.deepspeed.save_checkpoint(str(self.deepspeeds), tag="x")
        for file in self.deepspeeds.rglob("*.pt"):
            synced(file)

    def load_by_torch(self) -> None:
        for key, tensor in torch.load(self.torchs).items():
            self.wholes[key].copy_(tensor)

    def load(self, checkpoint: Checkpoint, verify: catalog.Verification) -> None:
        catalog.load(self.where, checkpoint, logical_state(self.engine), self.shapes, verify=verify)


def compare(scratch: Path, *, width: int, layers: int, rounds: int) -> int:
    comparison = Comparison(scratch, width=width, layers=layers)
    print(f"{comparison.bytes / 1e6:,.0f} MB of masters and AdamW's moments, in {scratch}")
    for number in range(rounds + 1):
        comparison.round(number)
        if number < rounds:
            comparison.where.delete(name_of_step(number))
            shutil.rmtree(comparison.deepspeeds)
    seconds = {name: times[len(times) // (rounds + 1) :] for name, times in comparison.seconds.items()}  # the first round warms up
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        print(f"  {name:26}{middle[name]:8.3f} s   ({min(times):.3f} to {max(times):.3f})")
    asked = subprocess.run([sys.executable, __file__, "--only-load", comparison.where.path], capture_output=True, text=True, check=True)
    got = {
        "blocking save / torch.save": middle["blocking save"] / middle["torch.save"],
        "load / torch.load": middle["load"] / middle["torch.load"],
        "stall / step": middle["stall"] / middle["step"],
        "hashes and manifest / save": middle["hashes and manifest"] / middle["blocking save"],
        "hashes / torch.load": (middle["load"] - middle["load by sizes alone"]) / middle["torch.load"],
        "memory of a load / share": json.loads(asked.stdout),
    }
    print(f"  {'hashes / load':30}{1 - middle['load by sizes alone'] / middle['load']:6.2f}   of a load that is so much faster")
    for name, ratio in got.items():
        print(f"  {name:30}{ratio:6.2f}   wanted at most {WANTED[name]}")
    missed = [name for name, ratio in got.items() if ratio > WANTED[name]]
    print(f"missed: {', '.join(missed)}" if missed else "met")
    return len(missed) > 0


def hash_blocks(wholes: dict[str, torch.Tensor]) -> None:
    """As a save or a load does it: block by block."""
    for tensor in wholes.values():
        flat = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        for start in range(0, len(flat), BLOCK):
            xxhash.xxh3_64(flat[start : start + BLOCK]).hexdigest()


def synced(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def tell_memory(directory: Path) -> int:
    """By how much a process grows that loads a checkpoint, over the bytes that it loads."""
    where = open_backend(directory)
    checkpoint = catalog.read_manifest(where, where.names()[0])
    tensors = {key: torch.empty(stored.shape) for key, stored in checkpoint.tensors.items()}  # memory that nothing lies in yet
    before = peak(anew=True)
    state = {key: TensorViews.from_whole(tensor) for key, tensor in tensors.items()}
    catalog.load(where, checkpoint, state, checkpoint.shapes, verify="full")
    print(json.dumps((peak() - before) / sum(tensor.nbytes for tensor in tensors.values())))
    return 0


def peak(*, anew: bool = False) -> int:
    """Bytes of memory that this process has held at most, since the start or since it was last asked anew."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    told = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(told.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
