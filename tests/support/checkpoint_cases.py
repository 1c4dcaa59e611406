"""Small checkpoints of random tensors, for tests of saving and loading."""

import math
from pathlib import Path

import torch

from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.manifest import Progress
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.storage import open_backend
from manta.trainer.checkpoint.writer import CheckpointWriter

SHAPES = {"master/embedding.weight": (700, 1024), "master/norm.weight": (1024,), "exp_avg/norm.weight": (1024,), "master/scale": ()}


def random_tensors(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


def whole_views(tensors: dict[str, torch.Tensor]) -> dict[str, TensorViews]:
    return {key: TensorViews.from_whole(tensor) for key, tensor in tensors.items()}


def progress(step: int) -> Progress:
    return Progress(step=step, samples_consumed=4 * step, optimizer_steps=step)


def open_writer(directory: Path, *, attempt: int = 1, **more) -> CheckpointWriter:
    return CheckpointWriter(open_backend(directory), identity={"corpus": "c"}, attempt=attempt, **more)


def save_steps(directory: Path, *steps: int, **more) -> None:
    """Save random tensors, with the step as their seed."""
    writer = open_writer(directory, **more)
    for step in steps:
        writer.save(whole_views(random_tensors(step)), progress(step))


def load_tensors(directory: Path, name: str) -> dict[str, torch.Tensor]:
    backend = open_backend(directory)
    tensors = {key: torch.full(shape, math.nan) for key, shape in SHAPES.items()}
    catalog.load(backend, catalog.read_manifest(backend, name), whole_views(tensors), SHAPES, verify="full")
    return tensors


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
