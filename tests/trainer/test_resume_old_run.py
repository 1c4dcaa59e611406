"""A run of an earlier version is resumed: its tensors are loaded exactly, and it takes the steps that the earlier version would take."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from conftest import MANTA
from old_run import EXPECTED, copy_old_run
from spmd import spmd

from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.engine_state import finish_restore, logical_state, restore
from manta.trainer.checkpoint.manifest import BLOCK, from_bytes, to_bytes
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.metrics import read_metrics
from manta.trainer.model.build import build_model
from manta.trainer.run_directory import RunDirectory

CHECKPOINT = "checkpoints/step-00000010"
VOCABULARY = 300


def stored_tensors(run: Path) -> dict[str, np.ndarray]:
    """Read a checkpoint as its format is documented, without importing manta."""
    manifest = json.loads((run / CHECKPOINT / "manifest.json").read_bytes())
    files = [(run / CHECKPOINT / name).read_bytes() for name, _, _ in manifest["files"]]
    tensors = {}
    for key, stored in manifest["tensors"].items():
        assert stored["dtype"] == "F32"
        tensors[key] = np.full(stored["shape"], np.nan, dtype=np.float32)
        for file, start, offsets, sizes in stored["chunks"]:
            values = np.frombuffer(files[file], dtype="<f4", count=int(np.prod(sizes)), offset=start)
            tensors[key][tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = values.reshape(sizes)
    return tensors


def loaded_parts(run: str) -> tuple[list, dict[str, np.ndarray], int]:
    """On each rank: what it holds of masters and optimizer state, its weights, and the optimizer's step count."""
    home, world = RunDirectory(Path(run)), World.from_environment()
    config = home.config()
    model = build_model(config.model, vocabulary=VOCABULARY, sequence_length=config.data.sequence_length)
    mesh = world.mesh(layout_for(config.train, config.parallel, world.size))
    engine = Engine(model, mesh=mesh, optimizer=config.optimizer, precision=config.precision)
    checkpoint = catalog.restore_newest(home.open_checkpoints(), lambda found: restore(home.open_checkpoints(), found, engine))
    assert checkpoint is not None
    finish_restore(checkpoint.progress, engine)
    state = logical_state(engine)
    parts = [(key, place.slices, part.numpy().copy()) for key, pieces in state.items() for place, part in pieces.views]
    weights = {name: weight.detach().numpy().copy() for name, weight in engine.module.named_parameters()}
    return parts, weights, checkpoint.progress.optimizer_steps


def differences(stored: dict[str, np.ndarray], ranks: list) -> list[str]:
    """Return the keys of tensors that no rank has loaded, or of which any element differs."""
    loaded = {key: np.full_like(tensor, np.nan) for key, tensor in stored.items()}
    for parts, _, _ in ranks:
        for key, slices, part in parts:
            loaded[key][slices] = part
    wrong = [key for key, tensor in stored.items() if not np.array_equal(tensor, loaded[key])]
    for _, weights, _ in ranks:
        wrong += [name for name, weight in weights.items() if not np.array_equal(stored[f"master/{name}"], weight)]
    return wrong


def test_an_old_run_s_tensors_are_loaded_exactly(tmp_path):
    run = copy_old_run(tmp_path / "old run")
    ranks = spmd(loaded_parts, 2, str(run))
    stored = stored_tensors(run)
    assert len(stored) == 3 * len(ranks[0][1])
    assert differences(stored, ranks) == []
    assert [count for _, _, count in ranks] == [10, 10]
    stored["exp_avg/norm.weight"][3] = np.nextafter(stored["exp_avg/norm.weight"][3], np.inf)
    assert differences(stored, ranks) == ["exp_avg/norm.weight"]


def resumed(run: Path, *overrides: str) -> list[dict]:
    """Resume a run, and return the metrics of its new steps."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [MANTA, "resume", run.name, *overrides]
    done = subprocess.run(command, cwd=run.parent, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [line for line in read_metrics(run / "metrics.jsonl") if line["step"] > 10]


def assert_as_expected(lines: list[dict]) -> None:
    for line, expected in zip(lines, EXPECTED, strict=True):
        for key in ("step", "data/digest", "learning_rate"):
            assert line[key] == expected[key]
        for key in {"train/loss", "grad_norm", "eval/loss"} & expected.keys():
            assert line[key] == pytest.approx(expected[key], rel=1e-5), f"step {line['step']}: {key}"


def test_an_old_run_is_resumed_and_takes_the_same_steps(tmp_path):
    run = copy_old_run(tmp_path / "old run")
    lines = resumed(run)
    assert_as_expected(lines)
    lines[4]["train/loss"] *= 1 + 2e-5
    with pytest.raises(AssertionError, match="step 15: train/loss"):
        assert_as_expected(lines)
    config = RunDirectory(run).config()
    assert (config.train.activation_checkpointing, config.checkpoint.max_failed_saves) == ("selective", 3)
    assert config.guard.replica_check_every_steps == 5
    text = (run / "config.yaml").read_text()
    for line in ("grace_period: 30.0", "hot_standby: false", "dedup: true", "not_matching: secret", "activation_checkpointing: selective"):
        assert line in text


@pytest.mark.slow
def test_a_changed_weight_is_noticed(tmp_path):
    run = copy_old_run(tmp_path / "old run")
    change_a_weight(run / CHECKPOINT, "master/norm.weight", 0.01)
    with pytest.raises(AssertionError, match="step 11: "):
        assert_as_expected(resumed(run))


@pytest.mark.slow
def test_another_sample_is_noticed(tmp_path):
    run = copy_old_run(tmp_path / "old run")
    with pytest.raises(AssertionError):
        assert_as_expected(resumed(run, "data.skip=[[80,81]]"))


def change_a_weight(folder: Path, key: str, by: float) -> None:
    """Change an element of a tensor, and the hashes of its block and of the manifest with it."""
    checkpoint = from_bytes((folder / "manifest.json").read_bytes(), str(folder))
    chunk = checkpoint.tensors[key].chunks[0]
    file = checkpoint.files[chunk.file]
    content = bytearray((folder / file.name).read_bytes())
    value = torch.frombuffer(content, dtype=torch.float32, count=1, offset=chunk.start)
    value += by
    (folder / file.name).write_bytes(content)
    hashes = tuple(xxhash.xxh3_64_hexdigest(content[start : start + BLOCK]) for start in range(0, len(content), BLOCK))
    files = list(checkpoint.files)
    files[chunk.file] = type(file)(file.name, file.bytes, hashes)
    object.__setattr__(checkpoint, "files", tuple(files))
    (folder / "manifest.json").write_bytes(to_bytes(checkpoint))
