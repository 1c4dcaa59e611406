"""Which checkpoints are valid, which are restored, which attempt may commit, and which are kept."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash
from checkpoint_cases import SHAPES, are_equal, load_tensors, open_writer, progress, random_tensors, save_steps, whole_views
from hypothesis import given
from hypothesis import strategies as st

from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.backend import Fence
from manta.trainer.checkpoint.errors import CheckpointError, FencedError, SaveError
from manta.trainer.checkpoint.manifest import name_of_step
from manta.trainer.checkpoint.reader import read_tensors
from manta.trainer.checkpoint.retention import Retention, surplus
from manta.trainer.checkpoint.storage import open_backend


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    directory = tmp_path / "checkpoints"
    save_steps(directory, 4, 8)
    return directory


def test_saved_tensors_are_loaded_and_other_libraries_can_read_them(checkpoints):
    assert are_equal(load_tensors(checkpoints, "step-00000008"), random_tensors(8))
    (file,) = (checkpoints / "step-00000008").glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    assert set(tensors) == {f"{key}@{','.join('0' * len(shape))}" for key, shape in SHAPES.items()}
    assert torch.equal(tensors["master/norm.weight@0"], random_tensors(8)["master/norm.weight"])
    assert (checkpoints / "latest").read_text() == "step-00000008\n"


def test_the_newest_checkpoint_is_found_and_half_written_ones_are_not(checkpoints):
    shutil.copytree(checkpoints / "step-00000008", checkpoints / ".step-00000012.a0001-00.partial")
    (checkpoints / "latest").write_text("step-00000099\n")
    assert catalog.newest_valid(open_backend(checkpoints)).progress == progress(8)


def change_manifest(file: Path, **changes) -> None:
    """Change a manifest's values, and its hash with them. None removes a key."""
    manifest = json.loads(file.read_text())
    del manifest["xxh3"]
    manifest = {key: value for key, value in (manifest | changes).items() if value is not None}
    body = json.dumps(manifest, separators=(",", ":"))[1:]
    file.write_text('{"xxh3":"' + xxhash.xxh3_128_hexdigest(body.encode()) + '",\n' + body + "\n")


@pytest.mark.parametrize("damage", ["truncate", "extend", "remove", "no manifest", "torn manifest", "another key", "another step"])
def test_a_damaged_checkpoint_is_skipped_and_named(checkpoints, damage, caplog):
    shard = next((checkpoints / "step-00000008").glob("*.safetensors"))
    manifest = checkpoints / "step-00000008/manifest.json"
    content = shard.read_bytes()
    match damage:
        case "truncate":
            shard.write_bytes(content[:-1])
        case "extend":
            shard.write_bytes(content + b"\0")
        case "remove":
            shard.unlink()
        case "no manifest":
            manifest.unlink()
        case "another key":
            manifest.write_text(manifest.read_text().replace('"files"', '"filez"'))
        case "another step":
            change_manifest(manifest, step=9)
        case "torn manifest":
            manifest.write_text(manifest.read_text()[:100])
    assert catalog.newest_valid(open_backend(checkpoints)).progress.step == 4
    assert "skipped a bad checkpoint" in caplog.text
    assert "step-00000008" in caplog.text


def test_any_flipped_bit_and_any_truncation_is_refused(checkpoints):
    directory = checkpoints / "step-00000008"
    files = sorted(directory.iterdir())
    assert [file.name for file in files] == ["manifest.json", "rank-0000.safetensors"]
    random = np.random.default_rng(5)
    for repetition in range(200):
        file = files[repetition % 2]
        content = file.read_bytes()
        position = int(random.integers(len(content)))
        damaged = bytearray(content)
        if repetition % 4 < 2:
            damaged[position] ^= 1 << int(random.integers(8))
        else:
            del damaged[position:]
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=file.name):
            catalog.verify(open_backend(checkpoints), directory.name)
        file.write_bytes(content)
    catalog.verify(open_backend(checkpoints), directory.name)


def test_a_flipped_bit_is_found_when_its_block_is_loaded(checkpoints):
    file = checkpoints / "step-00000008/rank-0000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    backend = open_backend(checkpoints)
    checkpoint = catalog.read_manifest(backend, "step-00000008")
    tensors = {key: torch.empty(shape) for key, shape in SHAPES.items()}
    with pytest.raises(CheckpointError, match=r"rank-0000.safetensors: xxh3 of bytes 1048576\.\.\."):
        catalog.load(backend, checkpoint, whole_views(tensors), SHAPES, verify="full")
    catalog.load(backend, checkpoint, whole_views(tensors), SHAPES, verify="sizes")
    assert not are_equal(tensors, random_tensors(8))


def test_a_run_with_only_bad_checkpoints_stops(checkpoints):
    for file in checkpoints.glob("*/*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="every checkpoint is bad"):
        catalog.newest_valid(open_backend(checkpoints))


def test_a_skipped_checkpoint_is_set_aside_and_displaces_no_good_one(checkpoints):
    (checkpoints / "step-00000008/rank-0000.safetensors").unlink()
    save_steps(checkpoints, 6, retention=Retention(newest=1))
    backend = open_backend(checkpoints)
    assert backend.names() == ["step-00000008", "step-00000006"]
    assert catalog.restore_newest(backend, lambda found: read_tensors(backend, found, {})).progress.step == 6
    assert backend.names() == ["step-00000006"]
    assert backend.bad() == ["bad-step-00000008"]
    assert (checkpoints / "bad-step-00000008/manifest.json").exists()


def test_another_model_is_refused_with_the_first_difference(checkpoints):
    backend = open_backend(checkpoints)
    checkpoint = catalog.read_manifest(backend, "step-00000008")
    with pytest.raises(CheckpointError, match=r"master/embedding.weight: expected \(700, 96\), got \(700, 1024\)"):
        catalog.load(backend, checkpoint, {}, SHAPES | {"master/embedding.weight": (700, 96)}, verify="full")


@pytest.mark.parametrize(("version", "remedy"), [(1, "Export it with the manta that wrote it"), (3, "Use a newer manta")])
def test_another_format_is_refused_with_a_remedy(checkpoints, version, remedy):
    change_manifest(checkpoints / "step-00000008/manifest.json", format=version)
    with pytest.raises(CheckpointError, match=f"format: expected 2, got {version}. {remedy}"):
        catalog.read_manifest(open_backend(checkpoints), "step-00000008")


def test_keys_that_an_older_manifest_lacks_have_their_defaults(checkpoints):
    change_manifest(checkpoints / "step-00000008/manifest.json", loss_scaler=None, cursors=None)
    assert catalog.read_manifest(open_backend(checkpoints), "step-00000008").progress == progress(8)


# Attempts


def test_a_dead_attempt_cannot_commit(checkpoints):
    dead, live = open_writer(checkpoints, attempt=1), open_writer(checkpoints, attempt=2)
    dead.set_fence()
    live.set_fence()
    with pytest.raises(FencedError, match="attempt 2 has started since"):
        dead.save(whole_views(random_tensors(12)), progress(12))
    assert open_backend(checkpoints).names() == ["step-00000008", "step-00000004"]
    live.save(whole_views(random_tensors(12)), progress(12))
    with pytest.raises(FencedError, match="attempt 2 has started since; this is attempt 1"):
        dead.set_fence()
    assert not list(checkpoints.glob(".*")), "nothing half-written is left"


def freeze_before_the_rename(dead, live, monkeypatch, *steps: int) -> None:
    """Let the live attempt start, and save, after the dead one has checked the fence for its commit."""
    read_fence = dead.backend._fence

    def freeze() -> Fence:
        fence = read_fence()
        live.set_fence()
        for step in steps:
            live.save(whole_views(random_tensors(13)), progress(step))
        return fence

    monkeypatch.setattr(dead.backend, "_fence", freeze)


def test_an_attempt_that_froze_before_its_commit_has_nothing_to_commit(checkpoints, monkeypatch):
    dead, live = open_writer(checkpoints, attempt=1), open_writer(checkpoints, attempt=2)
    dead.set_fence()
    freeze_before_the_rename(dead, live, monkeypatch)
    with pytest.raises(SaveError, match="No such file"):
        dead.save(whole_views(random_tensors(12)), progress(12))
    assert open_backend(checkpoints).names() == ["step-00000008", "step-00000004"]


def test_an_attempt_that_froze_before_its_commit_replaces_no_checkpoint(checkpoints, monkeypatch):
    dead, live = open_writer(checkpoints, attempt=1), open_writer(checkpoints, attempt=2)
    dead.set_fence()
    freeze_before_the_rename(dead, live, monkeypatch, 12)  # the same step
    with pytest.raises(SaveError, match="No such file"):
        dead.save(whole_views(random_tensors(12)), progress(12))
    assert open_backend(checkpoints).names()[0] == "step-00000012"
    assert open_backend(checkpoints).bad() == []
    assert are_equal(load_tensors(checkpoints, "step-00000012"), random_tensors(13))


def test_a_dead_attempt_deletes_nothing(checkpoints, monkeypatch):
    dead, live = open_writer(checkpoints, attempt=1, retention=Retention(newest=1)), open_writer(checkpoints, attempt=2)
    dead.set_fence()
    commit = dead.backend.commit

    def commit_and_freeze(*arguments) -> None:
        commit(*arguments)
        live.set_fence()

    monkeypatch.setattr(dead.backend, "commit", commit_and_freeze)
    dead.save(whole_views(random_tensors(12)), progress(12))
    assert open_backend(checkpoints).names() == ["step-00000012", "step-00000008", "step-00000004"]


def test_an_unsupervised_run_follows_all_earlier_attempts(checkpoints):
    dead, unsupervised, live = (open_writer(checkpoints, attempt=attempt) for attempt in (3, 0, 4))
    dead.set_fence()
    unsupervised.set_fence()
    with pytest.raises(FencedError, match="attempt 3 has started since"):
        dead.save(whole_views(random_tensors(12)), progress(12))
    unsupervised.save(whole_views(random_tensors(12)), progress(12))
    live.set_fence()
    with pytest.raises(FencedError, match="attempt 4 has started since"):
        unsupervised.save(whole_views(random_tensors(16)), progress(16))


def test_a_damaged_fence_is_reported_and_not_replaced(checkpoints):
    (checkpoints / "fence.json").write_text('{"attempt":')
    with pytest.raises(CheckpointError, match=r"fence\.json: damaged \(.*\)\. Delete it once no other attempt runs\."):
        open_writer(checkpoints, attempt=2).set_fence()


# Retention


def names_of(*steps: int) -> list[str]:
    return [name_of_step(step) for step in sorted(steps, reverse=True)]


@given(
    steps=st.sets(st.integers(0, 40), min_size=1),
    data=st.data(),
    retention=st.builds(Retention, newest=st.integers(1, 4), best=st.integers(0, 3), every=st.none() | st.integers(1, 10)),
    losses=st.dictionaries(st.integers(0, 40), st.floats(0, 9)),
)
def test_retention_keeps_the_newest_the_best_and_multiples(steps, data, retention, losses):
    newest = data.draw(st.sampled_from(sorted(steps)))
    deleted = surplus(names_of(*steps), name_of_step(newest), retention, lambda name: losses.get(int(name[5:])))
    kept = [step for step in steps if name_of_step(step) not in deleted]
    known = sorted((step for step in steps if step <= newest), reverse=True)
    assert newest in kept
    assert set(known[: retention.newest]) <= set(kept)
    assert {step for step in steps if step > newest} <= set(kept)
    if retention.every:
        assert {step for step in steps if step % retention.every == 0} <= set(kept)
    best = sorted((losses[step], -step) for step in known if step in losses)[: retention.best]
    assert {-step for _, step in best} <= set(kept)
    for step in kept:
        has_reason = step > newest or step in known[: retention.newest] or (retention.every and step % retention.every == 0)
        assert has_reason or (losses.get(step), -step) in best


def test_a_save_deletes_surplus_checkpoints(tmp_path):
    writer = open_writer(tmp_path, retention=Retention(newest=1, best=1, every=4))
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 4.0), (6, None)):
        writer.save(whole_views(random_tensors(step)), progress(step), about={"validation_loss": loss})
    assert open_backend(tmp_path).names() == names_of(6, 4, 2)
