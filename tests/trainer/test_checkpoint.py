"""A checkpoint is whole tensors: what any layout saved, any other loads."""

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
from manta.trainer.checkpoint.backend import open_backend
from manta.trainer.checkpoint.catalog import Retention
from manta.trainer.checkpoint.engine_state import engine_progress, finish_restore, load_weights, logical_state, refresh_weights, restore
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.manifest import LOSS_SCALER_FIELDS
from manta.trainer.checkpoint.rectangles import TensorViews, rectangles
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.config.sections import ParallelConfig, TrainConfig
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine import deepspeed as engines
from manta.trainer.engine.deepspeed import Engine

LINEAR = torch.nn.functional.linear  # ZeRO-3 puts another in its place, for good, which rounds otherwise
SAVED, LAST = 2, 7
TRAIN = TrainConfig(steps=LAST, global_batch=6, micro_batch=1)  # which one, two and three data ranks can share
BOUNDS = {"fp32": 1e-6, "bf16-autocast": 1e-3, "bf16": 1e-3, "fp16": 1e-3}  # of losses, where the layout is another


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
def test_pieces_lie_where_a_rank_s_part_lies_in_the_whole(shape, data):
    wholes = [size + data.draw(st.integers(0, 3)) for size in shape]
    offsets = [data.draw(st.integers(0, whole - size)) for whole, size in zip(wholes, shape, strict=True)]
    start = data.draw(st.integers(0, math.prod(shape)))
    whole = torch.arange(math.prod(wholes)).view(wholes)
    part = whole[tuple(slice(o, o + s) for o, s in zip(offsets, shape, strict=True))].reshape(-1)[start:].clone()
    pieces = TensorViews.from_flat(wholes, part, local_shape=shape, offsets=offsets, start=start)
    for place, view in pieces.views:
        assert torch.equal(view, whole[place.slices])
        assert view.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()  # nothing is copied
    assert sum(view.numel() for _, view in pieces.views) == part.numel()


@dataclass(frozen=True)
class Trail:
    """What is seen of an engine on its way."""

    losses: list[float]
    scaler: dict[str, float] | None
    biases: list[list[float]]


def build(cell: Cell, optimizer: str = "adamw", *, pieces: bool = False) -> Engine:
    """pieces: as a large model lies on its ranks."""
    layout = layout_for(TRAIN, cell.parallel, World.from_environment().size)
    torch.nn.functional.linear = LINEAR
    with patch.object(engines, "deepspeed_config", small_buckets) if pieces else nullcontext():
        return Engine(
            model(cell.model), mesh=World.from_environment().mesh(layout), optimizer=optimizer_config(optimizer), precision=cell.precision
        )


def advance(engine: Engine, cell: Cell, optimizer: str, first: int, last: int) -> Trail:
    """Steps first … last - 1; losses are of the whole global batch."""
    losses, layout = [], engine.layout
    for step in range(first, last):
        whole = batch(cell.model, step)
        numbers = (
            layout.samples(first=0, turn=turn, rank=engine.mesh.data_rank) for turn in range(layout.accumulation(TRAIN.global_batch))
        )
        terms = engine.step([rows(whole, taken) for taken in numbers], learning_rate=RATES[optimizer]).terms.double()
        dist.all_reduce(terms, group=engine.mesh.replicas)
        losses.append(float(terms.sum()))
    biases = [router.bias.tolist() for _, router in engine.module.routers() if router.bias is not None]
    return Trail(losses, engine_progress(engine, step=0, samples_consumed=0).loss_scaler, biases)


def save(engine: Engine, directory: Path, step: int, *, keep: int = 2, asynchronous: bool = False) -> None:
    come = engine_progress(engine, step=step, samples_consumed=step * TRAIN.global_batch)
    retention = Retention(newest=keep)
    saver = CheckpointWriter(open_backend(directory), identity={"corpus": "c"}, attempt=1, retention=retention, asynchronous=asynchronous)
    saver.save(logical_state(engine), come, wait=not asynchronous)
    saver.finish()


def resume(engine: Engine, directory: Path) -> None:
    where = open_backend(directory)
    checkpoint = catalog.restore_newest(where, lambda found: restore(where, found, engine))
    finish_restore(checkpoint.progress, engine)


Job = tuple[Path, Cell, str]  # where the checkpoint lies, which layout, which optimizer


def write(jobs: list[Job], *, pieces: bool = False) -> list[Trail]:
    """Each cell trains, saves, and goes on undisturbed."""
    trails = []
    for directory, cell, optimizer in jobs:
        engine = build(cell, optimizer, pieces=pieces)
        if cell.precision == "fp16":  # about to be raised, where the run has come so far
            for name, value in zip(LOSS_SCALER_FIELDS, (2.0**15, 995, -1, 1), strict=True):
                setattr(engine.zero_optimizer.loss_scaler, name, value)
        advance(engine, cell, optimizer, 0, SAVED)
        save(engine, directory, SAVED)
        trails.append(advance(engine, cell, optimizer, SAVED, LAST))
    return trails


def read(jobs: list[Job], *, pieces: bool = False) -> list[Trail]:
    """Each cell goes on from where a checkpoint was left."""
    trails = []
    for directory, cell, optimizer in jobs:
        engine = build(cell, optimizer, pieces=pieces)
        resume(engine, directory)
        trails.append(advance(engine, cell, optimizer, SAVED, LAST))
    return trails


def by_ranks(function, jobs: list[Job]) -> dict[Job, Trail]:
    """Those of as many ranks, one after another in the same processes; what rank 0 saw."""
    seen = {}
    for ranks in sorted({cell.ranks for _, cell, _ in jobs}):
        here = [job for job in jobs if job[1].ranks == ranks]
        seen |= dict(zip(here, spmd(function, ranks, here, timeout=1800.0)[0], strict=True))
    return seen


def check(writers: list[Job], readers: Callable[[Job], list[Cell]]) -> None:
    """Every writer's checkpoint, under the layouts of `readers`: bit by bit the same where it is the writer's own."""
    undisturbed = by_ranks(write, writers)
    jobs = {(writer[0], reader, writer[2]): writer for writer in writers for reader in readers(writer)}
    for job, trail in by_ranks(read, list(jobs)).items():
        writer, reader, wanted = jobs[job][1], job[1], undisturbed[jobs[job]]
        difference = max(abs(a - b) / abs(b) for a, b in zip(trail.losses, wanted.losses, strict=True))
        assert difference <= BOUNDS[reader.precision], f"{writer} -> {reader}"
        assert trail.scaler == wanted.scaler, f"{writer} -> {reader}"
        assert wanted.scaler is None or wanted.scaler["cur_scale"] == 2.0**16  # it was raised on the way
        if reader.precision == "fp32":
            assert trail.biases == wanted.biases, f"{writer} -> {reader}"
        if reader == writer:
            assert trail == wanted, f"{writer}: not bit by bit"


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
QUICK = ["llama", "fp16"]


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in QUICK)])
def test_what_any_layout_saved_others_load(tmp_path, family):
    """Each by itself, bit by bit, and by the next."""
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
def test_what_any_layout_saved_every_other_loads(tmp_path, name, precision):
    layouts = every_layout(name, precision)
    assert len(layouts) >= 12
    check([(tmp_path / str(cell), cell, "adamw") for cell in layouts], lambda _: layouts)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "moe"])
def test_what_any_layout_saved_others_load_in_every_precision(tmp_path, name, precision, optimizer):
    layouts = every_layout(name, precision)
    after = dict(zip(layouts, [*layouts[5:], *layouts[:5]], strict=True))
    check([(tmp_path / str(cell), cell, optimizer) for cell in layouts], lambda writer: [writer[1], after[writer[1]]])


KINDS = cells("llama", "fp32", 2, *STAGES, OFFLOADED[2], {"tensor": 2})


def piecemeal(directory: Path) -> None:
    own, other = ((directory, cell, "adamw") for cell in (KINDS[3], KINDS[1]))
    zero = build(own[1], pieces=True).zero_optimizer
    assert len(zero.fp32_partitioned_groups_flat) > len(zero.optimizer.param_groups)
    assert 0 < len(zero.persistent_parameters) < len(zero.grad_position)
    wanted = write([own], pieces=True)
    assert read([own], pieces=True) == wanted
    assert read([other])[0].losses == pytest.approx(wanted[0].losses, rel=1e-6)


@pytest.mark.slow
def test_zero_3_may_keep_masters_in_many_pieces_and_small_weights_whole(tmp_path):
    spmd(piecemeal, 2, tmp_path)


def unstepped(directory: Path, kinds: list[Cell]) -> None:
    for place, cell in enumerate(kinds):
        engine = build(cell)
        save(engine, directory / str(place), 0)
        wanted = advance(engine, cell, "adamw", 0, 2)
        resumed = build(cell)
        resume(resumed, directory / str(place))
        assert advance(resumed, cell, "adamw", 0, 2) == wanted, str(cell)


@pytest.mark.parametrize("kinds", [KINDS[1:4:2], pytest.param([*KINDS[::2], KINDS[-1]], marks=pytest.mark.slow)], ids=["some", "others"])
def test_a_run_that_never_stepped_can_be_saved(tmp_path, kinds):
    spmd(unstepped, 2, tmp_path, kinds)


def weights_alone(directory: Path) -> None:
    writer = KINDS[1]
    (undisturbed,) = write([(directory, writer, "adamw")])
    where = open_backend(directory)
    checkpoint = catalog.newest_valid(where)
    for cell in KINDS:
        engine = build(cell, "sgd")  # another optimizer: nothing of the old one's is asked for
        load_weights(where, checkpoint, engine)
        refresh_weights(engine)
        assert engine_progress(engine, step=0, samples_consumed=0).optimizer_steps == 0
        begun = advance(engine, cell, "sgd", SAVED, SAVED + 2)
        assert begun.losses[0] == pytest.approx(undisturbed.losses[0], rel=1e-6), str(cell)
        assert begun.losses[1] != pytest.approx(undisturbed.losses[1], rel=1e-4), str(cell)
    with pytest.raises(CheckpointError, match=r"master/blocks.0.attention.k_norm.weight: expected nothing, got \(8,\) \(and"):
        load_weights(where, checkpoint, build(Cell("gpt2", 2)))
    with pytest.raises(CheckpointError, match=r"exp_avg/blocks.0.attention.k_norm.weight: expected nothing, got \(8,\) \(and"):
        restore(where, checkpoint, build(writer, "sgd"))


def test_weights_are_loaded_without_their_optimizer_and_only_into_their_model(tmp_path):
    spmd(weights_alone, 2, tmp_path)


def losing(directory: Path) -> None:
    cell = KINDS[1]
    (undisturbed,) = write([(directory, cell, "adamw")])
    for lost in ("exp_avg/", "exp_avg_sq/", "master/blocks.1.mlp"):
        engine = build(cell)
        kept = {key: pieces for key, pieces in logical_state(engine).items() if not key.startswith(lost)}
        with patch("manta.trainer.checkpoint.engine_state.logical_state", lambda _, kept=kept: kept):
            resume(engine, directory)
        assert advance(engine, cell, "adamw", SAVED, LAST).losses != pytest.approx(undisturbed.losses, rel=1e-4), lost


def test_the_comparison_notices_what_is_lost(tmp_path):
    spmd(losing, 2, tmp_path)


def save_alike(directory: Path) -> None:
    for cell in (KINDS[0], KINDS[-1]):
        save(build(cell), directory / str(cell), 0)


def test_what_ranks_hold_alike_is_written_once_by_all_of_them(tmp_path):
    spmd(save_alike, 2, tmp_path)
    for directory in tmp_path.iterdir():
        checkpoint = catalog.newest_valid(open_backend(directory))
        for key, stored in checkpoint.tensors.items():
            assert sum(chunk.rectangle.count for chunk in stored.chunks) == math.prod(stored.shape), key
        first, second = (file.bytes for file in checkpoint.files)
        assert first == pytest.approx(second, rel=0.1)
