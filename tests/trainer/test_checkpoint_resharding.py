"""Resharding: a checkpoint written under any layout is loaded under any other."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from parity import RATES, Cell, batch, model, optimizer_config, rows, small_buckets
from spmd import spmd

from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.engine_state import engine_progress, finish_restore, load_weights, logical_state, refresh_weights, restore
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.manifest import LOSS_SCALER_FIELDS
from manta.trainer.checkpoint.rectangles import TensorViews, rectangles
from manta.trainer.checkpoint.retention import Retention
from manta.trainer.checkpoint.storage import open_backend
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.config.sections import ParallelConfig, TrainConfig
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine import deepspeed as engines
from manta.trainer.engine.deepspeed import Engine

LINEAR = torch.nn.functional.linear  # ZeRO-3 puts another in its place, for good, which rounds otherwise
SAVED, LAST = 2, 7
TRAIN = TrainConfig(steps=LAST, global_batch=6, micro_batch=1)  # which one, two and three data ranks can share
BOUNDS = {"fp32": 1e-6, "bf16-autocast": 1e-3, "bf16": 1e-3, "fp16": 1e-3}  # relative differences of losses under another layout


@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=4), data=st.data())
def test_rectangles_cover_a_flat_range_once_and_in_order(shape, data):
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    whole = np.arange(total).reshape(shape)
    found = rectangles(shape, start, stop)
    parts = [whole[tuple(slice(o, o + s) for o, s in zip(r.offsets, r.sizes, strict=True))].ravel() for r in found]
    assert np.array_equal(np.concatenate([np.arange(0), *parts]), np.arange(start, stop))
    assert len(found) <= 2 * len(shape) - 1


@given(data=st.data(), shape=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_views_have_the_offsets_of_the_ranks_part(shape, data):
    wholes = [size + data.draw(st.integers(0, 3)) for size in shape]
    offsets = [data.draw(st.integers(0, whole - size)) for whole, size in zip(wholes, shape, strict=True)]
    start = data.draw(st.integers(0, math.prod(shape)))
    whole = torch.arange(math.prod(wholes)).view(wholes)
    part = whole[tuple(slice(o, o + s) for o, s in zip(offsets, shape, strict=True))].reshape(-1)[start:].clone()
    held = TensorViews.from_flat(wholes, part, local_shape=shape, offsets=offsets, start=start)
    for place, view in held.views:
        assert torch.equal(view, whole[place.slices])
        assert view.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()  # nothing is copied
    assert sum(view.numel() for _, view in held.views) == part.numel()


@dataclass(frozen=True)
class Trail:
    """What an engine's steps produced."""

    losses: list[float]
    scaler: dict[str, float] | None
    biases: list[list[float]]


def build(cell: Cell, optimizer: str = "adamw", *, with_small_buckets: bool = False) -> Engine:
    """with_small_buckets: partition as ZeRO-3 does a large model."""
    layout = layout_for(TRAIN, cell.parallel, World.from_environment().size)
    torch.nn.functional.linear = LINEAR
    with patch.object(engines, "deepspeed_config", small_buckets) if with_small_buckets else nullcontext():
        return Engine(
            model(cell.model), mesh=World.from_environment().mesh(layout), optimizer=optimizer_config(optimizer), precision=cell.precision
        )


def advance(engine: Engine, cell: Cell, optimizer: str, first: int, last: int) -> Trail:
    """Train steps first to last - 1. Losses are of the whole global batch."""
    losses, layout = [], engine.layout
    for step in range(first, last):
        whole = batch(cell.model, step)
        numbers = (
            layout.samples_of_rank(first=0, micro_step=micro_step, rank=engine.mesh.data_rank)
            for micro_step in range(layout.accumulation(TRAIN.global_batch))
        )
        terms = engine.step([rows(whole, taken) for taken in numbers], learning_rate=RATES[optimizer]).terms.double()
        dist.all_reduce(terms, group=engine.mesh.replicas)
        losses.append(float(terms.sum()))
    biases = [router.bias.tolist() for _, router in engine.module.routers() if router.bias is not None]
    return Trail(losses, engine_progress(engine, step=0, samples_consumed=0).loss_scaler, biases)


def save(engine: Engine, directory: Path, step: int, *, keep: int = 2, asynchronous: bool = False) -> None:
    position = engine_progress(engine, step=step, samples_consumed=step * TRAIN.global_batch)
    retention = Retention(newest=keep)
    writer = CheckpointWriter(open_backend(directory), identity={"corpus": "c"}, attempt=1, retention=retention, asynchronous=asynchronous)
    writer.save(logical_state(engine), position, wait=not asynchronous)
    writer.finish()


def resume(engine: Engine, directory: Path) -> None:
    backend = open_backend(directory)
    checkpoint = catalog.restore_newest(backend, lambda found: restore(backend, found, engine))
    finish_restore(checkpoint.progress, engine)


Job = tuple[Path, Cell, str]  # the checkpoint's directory, the layout, and the optimizer


def save_jobs(jobs: list[Job], *, with_small_buckets: bool = False) -> list[Trail]:
    """Train, save, and continue uninterrupted, for each job."""
    trails = []
    for directory, cell, optimizer in jobs:
        engine = build(cell, optimizer, with_small_buckets=with_small_buckets)
        if cell.precision == "fp16":  # about to be raised, in a long run
            for name, value in zip(LOSS_SCALER_FIELDS, (2.0**15, 995, -1, 1), strict=True):
                setattr(engine.zero_optimizer.loss_scaler, name, value)
        advance(engine, cell, optimizer, 0, SAVED)
        save(engine, directory, SAVED)
        trails.append(advance(engine, cell, optimizer, SAVED, LAST))
    return trails


def resume_jobs(jobs: list[Job], *, with_small_buckets: bool = False) -> list[Trail]:
    """Resume from the checkpoint, for each job."""
    trails = []
    for directory, cell, optimizer in jobs:
        engine = build(cell, optimizer, with_small_buckets=with_small_buckets)
        resume(engine, directory)
        trails.append(advance(engine, cell, optimizer, SAVED, LAST))
    return trails


def by_ranks(function, jobs: list[Job]) -> dict[Job, Trail]:
    """Run jobs with the same number of ranks in the same processes. Return what rank 0 saw."""
    seen = {}
    for ranks in sorted({cell.ranks for _, cell, _ in jobs}):
        group = [job for job in jobs if job[1].ranks == ranks]
        seen |= dict(zip(group, spmd(function, ranks, group, timeout=1800.0)[0], strict=True))
    return seen


def check(writers: list[Job], readers: Callable[[Job], list[Cell]]) -> None:
    """Load each writer's checkpoint under the layouts of `readers`: bitwise the same losses under the writer's own layout."""
    uninterrupted = by_ranks(save_jobs, writers)
    jobs = {(writer[0], reader, writer[2]): writer for writer in writers for reader in readers(writer)}
    for job, trail in by_ranks(resume_jobs, list(jobs)).items():
        writer, reader, expected = jobs[job][1], job[1], uninterrupted[jobs[job]]
        difference = max(abs(a - b) / abs(b) for a, b in zip(trail.losses, expected.losses, strict=True))
        assert difference <= BOUNDS[reader.precision], f"{writer} -> {reader}"
        assert trail.scaler == expected.scaler, f"{writer} -> {reader}"
        assert expected.scaler is None or expected.scaler["cur_scale"] == 2.0**16  # it was raised on the way
        if reader.precision == "fp32":
            assert trail.biases == expected.biases, f"{writer} -> {reader}"
        if reader == writer:
            assert trail == expected, f"{writer}: not bitwise the same"


def cells(name: str, precision: str, ranks: int, *parallels: dict) -> list[Cell]:
    return [Cell(name, ranks, precision, ParallelConfig(**parallel)) for parallel in parallels]


STAGES = [{"zero": stage} for stage in (0, 1, 2, 3)]
OFFLOADED = [{"zero": stage, "offload": True} for stage in (1, 2, 3)]
SHARED = [{"tensor": 2}, {"tensor": 2, "zero": 3}, {"sequence": 2}, {"sequence": 2, "zero": 3}]
EXPERTS = [{"expert": 2}, {"expert": 2, "zero": 3}]


FAMILIES = {
    "llama": ("adamw", [*cells("llama", "fp32", 2, STAGES[1], {"tensor": 2}), *cells("llama", "fp32", 1, {"zero": 3})]),
    "fp16": ("adamw", cells("gpt2", "fp16", 2, {"zero": 1}, {"zero": 3, "offload": True})),
    "bf16": ("sgd", cells("gpt2", "bf16", 2, {"zero": 2}, {"zero": 3})),
    "experts": ("adamw", cells("gpt2-moe", "fp32", 2, *EXPERTS)),
}
QUICK = ["llama"]


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in QUICK)])
def test_each_layouts_checkpoint_is_loaded_by_another(tmp_path, family):
    """Each layout loads its own checkpoint bitwise, and another layout's."""
    optimizer, family = FAMILIES[family]
    check(
        [(tmp_path / str(cell), cell, optimizer) for cell in family],
        lambda writer: [writer[1], family[family.index(writer[1]) - 1]],
    )


def every_layout(name: str, precision: str) -> list[Cell]:
    products = (
        {"tensor": 2, "sequence": 2},
        {"tensor": 2, "zero": 3},
        {"sequence": 2, "expert": 2, "zero": 2},
        {"sequence": 2, "expert": 4},
    )
    named = (
        *cells(name, precision, 1, {"zero": 1}, {"zero": 3}),
        *cells(name, precision, 2, *STAGES, *OFFLOADED, *SHARED, *EXPERTS),
        *cells(name, precision, 3, *STAGES),
        *cells(name, precision, 4, *products),
    )
    return [cell for cell in named if cell.refusal is None]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2-moe"])
def test_each_layouts_checkpoint_is_loaded_by_every_other(tmp_path, name, precision):
    layouts = every_layout(name, precision)
    assert len(layouts) >= 12
    check([(tmp_path / str(cell), cell, "adamw") for cell in layouts], lambda _: layouts)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "moe"])
def test_each_layouts_checkpoint_is_loaded_in_every_precision(tmp_path, name, precision, optimizer):
    layouts = every_layout(name, precision)
    after = dict(zip(layouts, [*layouts[5:], *layouts[:5]], strict=True))
    check([(tmp_path / str(cell), cell, optimizer) for cell in layouts], lambda writer: [writer[1], after[writer[1]]])


KINDS = cells("llama", "fp32", 2, *STAGES, OFFLOADED[2], {"tensor": 2})


def save_and_resume_with_small_buckets(directory: Path) -> None:
    own, other = ((directory, cell, "adamw") for cell in (KINDS[3], KINDS[1]))
    zero = build(own[1], with_small_buckets=True).zero_optimizer
    assert len(zero.fp32_partitioned_groups_flat) > len(zero.optimizer.param_groups)
    assert 0 < len(zero.persistent_parameters) < len(zero.grad_position)
    expected = save_jobs([own], with_small_buckets=True)
    assert resume_jobs([own], with_small_buckets=True) == expected
    assert resume_jobs([other])[0].losses == pytest.approx(expected[0].losses, rel=1e-6)


@pytest.mark.slow
def test_zero_3_with_many_partitions_and_persistent_weights_is_loaded(tmp_path):
    spmd(save_and_resume_with_small_buckets, 2, tmp_path)


def unstepped(directory: Path, kinds: list[Cell]) -> None:
    for place, cell in enumerate(kinds):
        engine = build(cell)
        save(engine, directory / str(place), 0)
        expected = advance(engine, cell, "adamw", 0, 2)
        resumed = build(cell)
        resume(resumed, directory / str(place))
        assert advance(resumed, cell, "adamw", 0, 2) == expected, str(cell)


@pytest.mark.parametrize("kinds", [KINDS[1:4:2], pytest.param([*KINDS[::2], KINDS[-1]], marks=pytest.mark.slow)], ids=["some", "others"])
def test_a_run_that_never_stepped_can_be_saved(tmp_path, kinds):
    spmd(unstepped, 2, tmp_path, kinds)


def weights_alone(directory: Path) -> None:
    writer = KINDS[1]
    (uninterrupted,) = save_jobs([(directory, writer, "adamw")])
    backend = open_backend(directory)
    checkpoint = catalog.newest_valid(backend)
    for cell in KINDS:
        engine = build(cell, "sgd")  # another optimizer: nothing of the old one's is asked for
        load_weights(backend, checkpoint, engine)
        refresh_weights(engine)
        assert engine_progress(engine, step=0, samples_consumed=0).optimizer_steps == 0
        started = advance(engine, cell, "sgd", SAVED, SAVED + 2)
        assert started.losses[0] == pytest.approx(uninterrupted.losses[0], rel=1e-6), str(cell)
        assert started.losses[1] != pytest.approx(uninterrupted.losses[1], rel=1e-4), str(cell)
    with pytest.raises(CheckpointError, match=r"master/blocks.0.attention.k_norm.weight: expected nothing, got \(8,\) \(and"):
        load_weights(backend, checkpoint, build(Cell("gpt2", 2)))
    with pytest.raises(CheckpointError, match=r"exp_avg/blocks.0.attention.k_norm.weight: expected nothing, got \(8,\) \(and"):
        restore(backend, checkpoint, build(writer, "sgd"))


def test_weights_are_loaded_alone_and_only_into_their_model(tmp_path):
    spmd(weights_alone, 2, tmp_path)


def losing(directory: Path) -> None:
    cell = KINDS[1]
    (uninterrupted,) = save_jobs([(directory, cell, "adamw")])
    for lost in ("exp_avg/", "exp_avg_sq/", "master/blocks.1.mlp"):
        engine = build(cell)
        kept = {key: pieces for key, pieces in logical_state(engine).items() if not key.startswith(lost)}
        with patch("manta.trainer.checkpoint.engine_state.logical_state", lambda _, kept=kept: kept):
            resume(engine, directory)
        assert advance(engine, cell, "adamw", SAVED, LAST).losses != pytest.approx(uninterrupted.losses, rel=1e-4), lost


def test_the_comparison_detects_lost_tensors(tmp_path):
    spmd(losing, 2, tmp_path)


def save_alike(directory: Path) -> None:
    for cell in (KINDS[0], KINDS[-1]):
        save(build(cell), directory / str(cell), 0)


def test_replicated_tensors_are_written_once_and_shared_by_ranks(tmp_path):
    spmd(save_alike, 2, tmp_path)
    for directory in tmp_path.iterdir():
        checkpoint = catalog.newest_valid(open_backend(directory))
        for key, stored in checkpoint.tensors.items():
            assert sum(chunk.rectangle.count for chunk in stored.chunks) == math.prod(stored.shape), key
        first, second = (file.bytes for file in checkpoint.files)
        assert first == pytest.approx(second, rel=0.1)
