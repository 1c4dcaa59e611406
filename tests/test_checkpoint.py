"""A checkpoint is whole tensors: it comes back under another number of ranks, and a damaged one does not count."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spmd import spmd

from manta.trainer.checkpoint import store
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.pieces import rectangles
from manta.trainer.checkpoint.state import after_load, logical_shapes, logical_state, optimizer_steps
from manta.trainer.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
from manta.trainer.engine import Engine, Microbatch
from manta.trainer.layout import fits
from manta.trainer.model.gpt import GPT
from manta.trainer.world import World

MODEL = ModelConfig(layers=2, width=48, heads=4, kv_heads=2, mlp_width=96)
TRAIN = TrainConfig(steps=20, global_batch=8, micro_batch=2)


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


def build(optimizer: str, precision: Precision) -> Engine:
    model = GPT(MODEL, vocabulary=250)
    model.initialize(seed=1)
    layout = fits(TRAIN, World.from_environment().size)
    return Engine(model, layout=layout, optimizer=OptimizerConfig(name=optimizer, gradient_clipping=0.5), precision=precision)


def advance(engine: Engine, first: int, last: int) -> list[float]:
    """Losses of steps first … last - 1 over the whole global batch."""
    losses = []
    for step in range(first, last):
        windows = torch.randint(0, 250, (TRAIN.global_batch, 17), generator=torch.Generator().manual_seed(step))
        rank, layout = World.from_environment().rank, engine.layout
        taken = (windows[torch.from_numpy(layout.samples(step=0, turn=turn, rank=rank))] for turn in range(layout.accumulation))
        loss, _ = engine.step((Microbatch(tokens=w[:, :-1], targets=w[:, 1:]) for w in taken), learning_rate=1e-2)
        torch.distributed.all_reduce(loss)
        losses.append(float(loss) / World.from_environment().size)
    return losses


def save_and_go_on(directory: Path, optimizer: str, precision: Precision) -> list[float]:
    engine = build(optimizer, precision)
    advance(engine, 0, 4)
    progress = store.Progress(step=4, samples_consumed=32, optimizer_steps=optimizer_steps(engine))
    store.save(directory, logical_state(engine), progress, identity={"corpus": "c"}, attempt=1, keep=2)
    return advance(engine, 4, 9)


def load_and_go_on(directory: Path, optimizer: str, precision: Precision) -> list[float]:
    engine = build(optimizer, precision)
    checkpoint = store.newest(directory)
    store.load(checkpoint, logical_state(engine), logical_shapes(engine))
    after_load(engine, checkpoint.progress.optimizer_steps)
    return advance(engine, 4, 9)


@pytest.mark.parametrize(
    ("writers", "readers", "optimizer", "precision"),
    [
        (1, (1, 2), "adamw", "fp32"),
        (2, (1, 2, 4), "adamw", "fp32"),
        (2, (1, 2), "adamw", "bf16"),
        (2, (1, 2), "sgd", "fp32"),
        pytest.param(4, (1, 2, 4), "adamw", "fp32", marks=pytest.mark.slow),
        pytest.param(4, (1, 2, 4), "adamw", "bf16", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_loads_what_any_other_saved(tmp_path, writers, readers, optimizer, precision):
    undisturbed = spmd(save_and_go_on, writers, tmp_path, optimizer, precision)[0]
    for ranks in readers:
        resumed = spmd(load_and_go_on, ranks, tmp_path, optimizer, precision)[0]
        if ranks == writers:
            assert resumed == undisturbed  # bit by bit
        else:
            assert resumed == pytest.approx(undisturbed, rel=1e-6 if precision == "fp32" else 1e-3)


def load_without_optimizer_state(directory: Path) -> list[float]:
    engine = build("adamw", "fp32")
    checkpoint = store.newest(directory)
    state = {key: pieces for key, pieces in logical_state(engine).items() if key.startswith("master/")}
    store.load(checkpoint, state, checkpoint.tensors)
    after_load(engine, 0)
    return advance(engine, 4, 9)


def test_the_comparison_notices_a_lost_optimizer_state(tmp_path):
    undisturbed = spmd(save_and_go_on, 2, tmp_path, "adamw", "fp32")[0]
    resumed = spmd(load_without_optimizer_state, 2, tmp_path)[0]
    assert resumed != pytest.approx(undisturbed, rel=1e-4)


def save_unstepped(directory: Path) -> list[float]:
    engine = build("adamw", "fp32")
    progress = store.Progress(step=0, samples_consumed=0, optimizer_steps=optimizer_steps(engine))
    store.save(directory, logical_state(engine), progress, identity={}, attempt=1, keep=2)
    return advance(engine, 4, 9)


def test_a_run_that_never_stepped_can_be_saved(tmp_path):
    assert spmd(save_unstepped, 2, tmp_path) == spmd(load_and_go_on, 2, tmp_path, "adamw", "fp32")


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    spmd(save_and_go_on, 2, directory, "adamw", "fp32")
    manifest = json.loads((directory / "step-00000004/manifest.json").read_text())
    shutil.copytree(directory / "step-00000004", directory / "step-00000008")
    del manifest["xxh3"]
    later = manifest | {"step": 8}
    (directory / "step-00000008/manifest.json").write_text(json.dumps(later | {"xxh3": store._digest(later)}))
    return directory


@pytest.fixture
def checkpoints(two_checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))


def test_the_newest_checkpoint_is_taken_and_half_written_ones_are_not_seen(checkpoints):
    shutil.copytree(checkpoints / "step-00000008", checkpoints / ".step-00000012.attempt-0001.partial")
    assert store.newest(checkpoints).progress.step == 8
    (checkpoints / "latest").write_text("step-00000099\n")
    assert store.newest(checkpoints).progress.step == 8


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest", "torn manifest", "another key", "another step"])
def test_a_damaged_checkpoint_is_passed_over_and_named(checkpoints, damage, caplog):
    shard = next((checkpoints / "step-00000008").glob("__1_*"))
    manifest = checkpoints / "step-00000008/manifest.json"
    content = bytearray(shard.read_bytes())
    match damage:
        case "flip":
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
        case "truncate":
            shard.write_bytes(content[:-1])
        case "remove":
            shard.unlink()
        case "no manifest":
            manifest.unlink()
        case "another key":
            manifest.write_text(manifest.read_text().replace('"files"', '"filez"'))
        case "another step":
            manifest.write_text(manifest.read_text().replace('"step": 8', '"step": 9'))
        case "torn manifest":
            manifest.write_text(manifest.read_text()[:100])
    assert store.newest(checkpoints).progress.step == 4
    assert "passed over a bad checkpoint" in caplog.text
    assert "step-00000008" in caplog.text


def test_a_run_whose_checkpoints_are_all_bad_stops(checkpoints):
    for path in store.committed(checkpoints):
        (path / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint is bad"):
        store.newest(checkpoints)


def test_another_model_is_refused_with_the_first_difference(checkpoints):
    checkpoint = store.newest(checkpoints)
    with pytest.raises(CheckpointError, match=r"exp_avg/embedding.weight: got \(256, 48\), wants \(256, 64\)"):
        store.load(checkpoint, {}, checkpoint.tensors | {"exp_avg/embedding.weight": (256, 64)})


def save_step_six(directory: Path) -> None:
    engine = build("adamw", "fp32")
    progress = store.Progress(step=6, samples_consumed=48, optimizer_steps=0)
    store.save(directory, logical_state(engine), progress, identity={}, attempt=2, keep=1)


def test_bad_checkpoints_ahead_push_no_good_one_out(checkpoints):
    (checkpoints / "step-00000008/.metadata").unlink()
    spmd(save_step_six, 2, checkpoints)
    assert store.newest(checkpoints).progress.step == 6
    store.set_aside(checkpoints, store.newest(checkpoints))
    assert [path.name for path in store.committed(checkpoints)] == ["step-00000006"]
    assert (checkpoints / "bad-step-00000008").exists()


def save_three_times(directory: Path) -> None:
    engine = build("adamw", "fp32")
    for step in (1, 2, 3):
        advance(engine, step - 1, step)
        progress = store.Progress(step=step, samples_consumed=8 * step, optimizer_steps=step)
        store.save(directory, logical_state(engine), progress, identity={}, attempt=1, keep=2)


def test_only_the_newest_are_kept(tmp_path):
    spmd(save_three_times, 2, tmp_path)
    assert [path.name for path in store.committed(tmp_path)] == ["step-00000003", "step-00000002"]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"


def private_parts() -> None:
    engine = build("adamw", "fp32")
    assert {"single_partition_of_fp32_groups", "update_lp_params", "_lazy_init_hp_params_optimizer_state"} <= set(dir(engine.zero))
    mapped = [p._hp_mapping for p in engine.module.parameters() if p._hp_mapping is not None]
    assert mapped
    for mapping in mapped:
        for address in (mapping.lp_fragment_address, mapping.hp_fragment_address):
            assert address.numel > 0 <= address.start
        assert mapping.param_group_index in (0, 1)


def test_deepspeed_still_has_the_private_parts_we_read():
    spmd(private_parts, 2)
