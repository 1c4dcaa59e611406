"""Which checkpoints count: those that hold, byte by byte, what their manifest says, committed by an attempt that was not yet dead."""

import json
import math
import shutil
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.trainer.checkpoint import catalog, token_rows
from manta.trainer.checkpoint.backend import Fence, open_backend
from manta.trainer.checkpoint.catalog import Retention, surplus
from manta.trainer.checkpoint.errors import CheckpointError, FencedError, SaveError
from manta.trainer.checkpoint.manifest import BLOCK, Progress, name_of_step
from manta.trainer.checkpoint.reader import SPAN, read_tensors
from manta.trainer.checkpoint.rectangles import Rectangle, TensorViews, rectangles
from manta.trainer.checkpoint.write_plan import MIN_SPLIT, TensorRegions, plan_writes
from manta.trainer.checkpoint.writer import CheckpointWriter

SHAPES = {"master/embedding.weight": (700, 1024), "master/norm.weight": (1024,), "exp_avg/norm.weight": (1024,), "master/scale": ()}


def tensors(seed: int = 1) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=random) for key, shape in SHAPES.items()}


def whole(held: dict[str, torch.Tensor]) -> dict[str, TensorViews]:
    return {key: TensorViews.from_whole(tensor) for key, tensor in held.items()}


def saver(directory: Path, *, attempt: int = 1, retention: Retention | None = None, **more) -> CheckpointWriter:
    return CheckpointWriter(open_backend(directory), identity={"corpus": "c"}, attempt=attempt, retention=retention, **more)


def progress(step: int) -> Progress:
    return Progress(step=step, samples_consumed=4 * step, optimizer_steps=step)


def save(directory: Path, *steps: int, **how) -> None:
    begun = saver(directory, **how)
    for step in steps:
        begun.save(whole(tensors(step)), progress(step))


def loaded(directory: Path, name: str) -> dict[str, torch.Tensor]:
    where = open_backend(directory)
    filled = {key: torch.full(shape, math.nan) for key, shape in SHAPES.items()}
    catalog.load(where, catalog.read_manifest(where, name), whole(filled), SHAPES, verify="full")
    return filled


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    directory = tmp_path / "checkpoints"
    save(directory, 4, 8)
    return directory


def test_what_is_saved_comes_back_and_others_can_read_it(checkpoints):
    assert equal(loaded(checkpoints, "step-00000008"), tensors(8))
    (file,) = (checkpoints / "step-00000008").glob("*.safetensors")
    theirs = safetensors.torch.load_file(file)
    assert set(theirs) == {f"{key}@{','.join('0' * len(shape))}" for key, shape in SHAPES.items()}
    assert torch.equal(theirs["master/norm.weight@0"], tensors(8)["master/norm.weight"])
    assert (checkpoints / "latest").read_text() == "step-00000008\n"


def test_the_newest_checkpoint_is_taken_and_half_written_ones_are_not_seen(checkpoints):
    shutil.copytree(checkpoints / "step-00000008", checkpoints / ".step-00000012.a0001-00.partial")
    (checkpoints / "latest").write_text("step-00000099\n")
    assert catalog.newest_valid(open_backend(checkpoints)).progress == progress(8)


def rewritten(file: Path, **changes) -> None:
    """A manifest that says something else, and is whole."""
    told = json.loads(file.read_text())
    del told["xxh3"]
    told = {key: value for key, value in (told | changes).items() if value is not None}
    body = json.dumps(told, separators=(",", ":"))[1:]
    file.write_text('{"xxh3":"' + xxhash.xxh3_128_hexdigest(body.encode()) + '",\n' + body + "\n")


@pytest.mark.parametrize("damage", ["truncate", "extend", "remove", "no manifest", "torn manifest", "another key", "another step"])
def test_a_damaged_checkpoint_is_passed_over_and_named(checkpoints, damage, caplog):
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
            rewritten(manifest, step=9)
        case "torn manifest":
            manifest.write_text(manifest.read_text()[:100])
    assert catalog.newest_valid(open_backend(checkpoints)).progress.step == 4
    assert "skipped a bad checkpoint" in caplog.text
    assert "step-00000008" in caplog.text


def test_any_flipped_bit_and_any_truncation_is_refused(checkpoints):
    folder = checkpoints / "step-00000008"
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["manifest.json", "rank-0000.safetensors"]
    random = np.random.default_rng(5)
    for turn in range(200):
        file = files[turn % 2]
        content = file.read_bytes()
        place = int(random.integers(len(content)))
        damaged = bytearray(content)
        if turn % 4 < 2:
            damaged[place] ^= 1 << int(random.integers(8))
        else:
            del damaged[place:]
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=file.name):
            catalog.verify(open_backend(checkpoints), folder.name)
        file.write_bytes(content)
    catalog.verify(open_backend(checkpoints), folder.name)


def test_a_bit_that_flips_where_a_rank_reads_is_found_as_it_reads(checkpoints):
    file = checkpoints / "step-00000008/rank-0000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    where = open_backend(checkpoints)
    filled = {key: torch.empty(shape) for key, shape in SHAPES.items()}
    with pytest.raises(CheckpointError, match=r"rank-0000.safetensors: xxh3 of bytes 1048576\.\.\."):
        catalog.load(where, catalog.read_manifest(where, "step-00000008"), whole(filled), SHAPES, verify="full")
    catalog.load(where, catalog.read_manifest(where, "step-00000008"), whole(filled), SHAPES, verify="sizes")
    assert not equal(filled, tensors(8))


def test_a_run_whose_checkpoints_are_all_bad_stops(checkpoints):
    for file in checkpoints.glob("*/*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="every checkpoint is bad"):
        catalog.newest_valid(open_backend(checkpoints))


def test_what_was_passed_over_is_set_aside_and_pushes_no_good_one_out(checkpoints):
    (checkpoints / "step-00000008/rank-0000.safetensors").unlink()
    save(checkpoints, 6, retention=Retention(newest=1))
    where = open_backend(checkpoints)
    assert where.names() == ["step-00000008", "step-00000006"]
    assert catalog.restore_newest(where, lambda found: read_tensors(where, found, {})).progress.step == 6
    assert where.names() == ["step-00000006"]
    assert where.bad() == ["bad-step-00000008"]
    assert (checkpoints / "bad-step-00000008/manifest.json").exists()


def test_another_model_is_refused_with_the_first_difference(checkpoints):
    where = open_backend(checkpoints)
    found = catalog.read_manifest(where, "step-00000008")
    with pytest.raises(CheckpointError, match=r"master/embedding.weight: expected \(700, 96\), got \(700, 1024\)"):
        catalog.load(where, found, {}, SHAPES | {"master/embedding.weight": (700, 96)}, verify="full")


@pytest.mark.parametrize(("form", "told"), [(1, "Export it with the manta that wrote it"), (3, "Use a newer manta")])
def test_another_format_says_what_to_do(checkpoints, form, told):
    rewritten(checkpoints / "step-00000008/manifest.json", format=form)
    with pytest.raises(CheckpointError, match=f"format: expected 2, got {form}. {told}"):
        catalog.read_manifest(open_backend(checkpoints), "step-00000008")


def test_what_an_older_manifest_does_not_say_is_left_as_it_was(checkpoints):
    rewritten(checkpoints / "step-00000008/manifest.json", loss_scaler=None, cursors=None)
    assert catalog.read_manifest(open_backend(checkpoints), "step-00000008").progress == progress(8)


# Attempts


def test_a_dead_attempt_can_not_commit(checkpoints):
    dead, live = saver(checkpoints, attempt=1), saver(checkpoints, attempt=2)
    dead.set_fence()
    live.set_fence()
    with pytest.raises(FencedError, match="attempt 2 has started since"):
        dead.save(whole(tensors(12)), progress(12))
    assert open_backend(checkpoints).names() == ["step-00000008", "step-00000004"]
    live.save(whole(tensors(12)), progress(12))
    with pytest.raises(FencedError, match="attempt 2 has started since; this is attempt 1"):
        dead.set_fence()
    assert not list(checkpoints.glob(".*")), "nothing half written is left"


def test_an_attempt_that_froze_as_it_was_about_to_commit_finds_nothing_to_commit(checkpoints, monkeypatch):
    dead, live = saver(checkpoints, attempt=1), saver(checkpoints, attempt=2)
    dead.set_fence()

    look = dead.backend._fence

    def froze() -> Fence:
        seen = look()
        live.set_fence()  # between the look and the rename
        return seen

    monkeypatch.setattr(dead.backend, "_fence", froze)
    with pytest.raises(SaveError, match="No such file"):
        dead.save(whole(tensors(12)), progress(12))
    assert open_backend(checkpoints).names() == ["step-00000008", "step-00000004"]


def test_an_attempt_that_froze_as_it_was_about_to_commit_leaves_another_s_checkpoint_in_its_place(checkpoints, monkeypatch):
    dead, live = saver(checkpoints, attempt=1), saver(checkpoints, attempt=2)
    dead.set_fence()

    look = dead.backend._fence

    def froze() -> Fence:
        seen = look()
        live.set_fence()
        live.save(whole(tensors(13)), progress(12))  # the same step, meanwhile
        return seen

    monkeypatch.setattr(dead.backend, "_fence", froze)
    with pytest.raises(SaveError, match="No such file"):
        dead.save(whole(tensors(12)), progress(12))
    assert open_backend(checkpoints).names()[0] == "step-00000012"
    assert open_backend(checkpoints).bad() == []
    assert equal(loaded(checkpoints, "step-00000012"), tensors(13))


def test_a_dead_attempt_deletes_nothing(checkpoints, monkeypatch):
    dead, live = saver(checkpoints, attempt=1, retention=Retention(newest=1)), saver(checkpoints, attempt=2)
    dead.set_fence()
    commit = dead.backend.commit

    def slow(*given) -> None:
        commit(*given)
        live.set_fence()

    monkeypatch.setattr(dead.backend, "commit", slow)
    dead.save(whole(tensors(12)), progress(12))
    assert open_backend(checkpoints).names() == ["step-00000012", "step-00000008", "step-00000004"]


def test_who_runs_it_by_hand_comes_after_whoever_was_there(checkpoints):
    dead, by_hand, live = saver(checkpoints, attempt=3), saver(checkpoints, attempt=0), saver(checkpoints, attempt=4)
    dead.set_fence()
    by_hand.set_fence()
    with pytest.raises(FencedError, match="attempt 3 has started since"):
        dead.save(whole(tensors(12)), progress(12))
    by_hand.save(whole(tensors(12)), progress(12))
    live.set_fence()
    with pytest.raises(FencedError, match="attempt 4 has started since"):
        by_hand.save(whole(tensors(16)), progress(16))


def test_a_damaged_fence_is_told_and_nobody_saves_over_it(checkpoints):
    (checkpoints / "fence.json").write_text('{"attempt":')
    with pytest.raises(CheckpointError, match=r"fence\.json: damaged \(.*\)\. Delete it once no other attempt runs\."):
        saver(checkpoints, attempt=2).set_fence()


# In the background


def test_a_save_in_the_background_is_of_the_moment_it_began(tmp_path, monkeypatch):
    held = tensors()
    begun = saver(tmp_path, asynchronous=True)
    write = begun.backend.write
    begins = []

    def slow(*given) -> str:
        while not begins:
            pass
        return write(*given)

    monkeypatch.setattr(begun.backend, "write", slow)
    begun.save(whole(held), progress(1), wait=False)
    assert begun.is_busy
    assert open_backend(tmp_path).names() == []
    for tensor in held.values():
        tensor.zero_()
    begins.append(True)
    begun.finish()
    assert not begun.is_busy
    assert equal(loaded(tmp_path, "step-00000001"), tensors())
    memory = begun._file._staging.data_ptr()
    begun.save(whole(tensors(2)), progress(2), wait=False)
    begun.finish()
    assert equal(loaded(tmp_path, "step-00000002"), tensors(2))
    assert begun._file._staging.data_ptr() == memory, "the same memory serves each save"


def test_a_failure_in_the_background_is_told_once(tmp_path, monkeypatch):
    begun = saver(tmp_path, asynchronous=True)

    def full(*_) -> str:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    with monkeypatch.context() as patch:
        patch.setattr(begun.backend, "write", full)
        begun.save(whole(tensors()), progress(1), wait=False)
        begun._thread.join()
        assert begun.has_failed
        with pytest.raises(
            SaveError, match=r"rank 0: .*/x: No space left on device: needs 2,8.* bytes, and .* were free\. Free some space"
        ):
            begun.finish()
    assert not begun.has_failed
    begun.finish()
    begun.save(whole(tensors(2)), progress(2))
    assert equal(loaded(tmp_path, "step-00000002"), tensors(2))


# What is kept


def names(*steps: int) -> list[str]:
    return [name_of_step(step) for step in sorted(steps, reverse=True)]


@given(
    steps=st.sets(st.integers(0, 40), min_size=1),
    good=st.data(),
    keep=st.builds(Retention, newest=st.integers(1, 4), best=st.integers(0, 3), every=st.none() | st.integers(1, 10)),
    losses=st.dictionaries(st.integers(0, 40), st.floats(0, 9)),
)
def test_what_is_kept(steps, good, keep, losses):
    newest = good.draw(st.sampled_from(sorted(steps)))
    gone = surplus(names(*steps), name_of_step(newest), keep, lambda name: losses.get(int(name[5:])))
    left = [step for step in steps if name_of_step(step) not in gone]
    behind = sorted((step for step in steps if step <= newest), reverse=True)
    assert newest in left
    assert set(behind[: keep.newest]) <= set(left)
    assert {step for step in steps if step > newest} <= set(left)
    if keep.every:
        assert {step for step in steps if step % keep.every == 0} <= set(left)
    best = sorted((losses[step], -step) for step in behind if step in losses)[: keep.best]
    assert {-step for _, step in best} <= set(left)
    for step in left:
        known = step > newest or step in behind[: keep.newest] or (keep.every and step % keep.every == 0)
        assert known or (losses.get(step), -step) in best


def test_a_save_leaves_what_is_to_be_kept(tmp_path):
    begun = saver(tmp_path, retention=Retention(newest=1, best=1, every=4))
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 4.0), (6, None)):
        begun.save(whole(tensors(step)), progress(step), about={"validation_loss": loss})
    assert open_backend(tmp_path).names() == names(6, 4, 2)


# Shares and reading, whatever the cuts


@given(st.data())
def test_shares_cover_each_tensor_once_and_are_about_as_large(data):
    ranks = data.draw(st.integers(1, 6))
    held: list[list[TensorRegions]] = [[] for _ in range(ranks)]
    total = 0
    for number in range(data.draw(st.integers(1, 5))):
        shape = tuple(data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=2)))
        owners = data.draw(st.sampled_from([size for size in range(1, ranks + 1) if ranks % size == 0]))
        count = math.prod(shape)  # cut flat over so many owners, and each cut held alike by ranks / owners
        total += 4 * count
        for rank in range(ranks):
            owner = rank % owners
            places = rectangles(shape, count * owner // owners, count * (owner + 1) // owners)
            held[rank].append(TensorRegions(f"master/{number}", shape, torch.float32, tuple(places)))
    made = plan_writes(held)
    covered = {key: np.zeros(shape, dtype=int) for key, (_, shape) in made.tensors.items()}
    for rank, share in enumerate(made.regions):
        for key, place in share:
            covered[key][place.slices] += 1
            assert any(outer.overlap(place) == place for tensor in held[rank] if tensor.key == key for outer in tensor.rectangles)
    assert all((count == 1).all() for count in covered.values())
    alike = [sum(4 * place.count for _, place in share) for share in made.regions]
    assert max(alike) <= total / ranks + 4 * MIN_SPLIT * 3 + max((4 * t.rectangles[0].count for t in held[0] if t.rectangles), default=0)


def test_a_layout_that_loses_a_part_is_not_saved():
    half = TensorRegions("master/x", (4, 4), torch.float32, (Rectangle((0, 0), (2, 4)),))
    with pytest.raises(AssertionError, match="master/x: ranks hold 8 of its 16 elements"):
        plan_writes([[half], [half]])


def cut(tensor: torch.Tensor, shape: Sequence[int], places: list[Rectangle]) -> TensorViews:
    return TensorViews(tuple(shape), tensor.dtype, tuple((place, tensor[place.slices]) for place in places))


@settings(deadline=None)  # it writes files
@given(data=st.data(), shape=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_any_rectangle_is_read_out_of_any_chunks(tmp_path_factory, data, shape):
    directory = tmp_path_factory.mktemp("cut")
    count = math.prod(shape)
    tensor = torch.arange(count, dtype=torch.float32).view(shape)
    ends = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=3))})
    places = [place for a, b in pairwise(ends) for place in rectangles(shape, a, b)]
    saver(directory).save({"x": cut(tensor, shape, places)}, progress(1))
    where = open_backend(directory)
    offsets = [data.draw(st.integers(0, size - 1)) for size in shape]
    wanted = Rectangle(tuple(offsets), tuple(data.draw(st.integers(1, size - o)) for size, o in zip(shape, offsets, strict=True)))
    filled = torch.full(shape, -1.0)
    read_tensors(where, catalog.read_manifest(where, "step-00000001"), {"x": cut(filled, shape, [wanted])})
    expected = torch.full(shape, -1.0)
    expected[wanted.slices] = tensor[wanted.slices]
    assert torch.equal(filled, expected)
    shutil.rmtree(directory)


@pytest.mark.parametrize("wanted", [Rectangle((0, 0), (3, 1_500_000)), Rectangle((0, 700_000), (3, 9)), Rectangle((1, 3), (2, 1_499_990))])
def test_what_is_large_is_read_in_parts_and_only_the_blocks_that_are_needed(tmp_path, wanted, monkeypatch):
    tensor = torch.arange(4_500_000, dtype=torch.float32).view(3, 1_500_000)  # rows of 6 MB, of which no two fit a span
    assert 2 * tensor.stride(0) * 4 > SPAN
    saver(tmp_path).save({"x": TensorViews.from_whole(tensor)}, progress(1))
    where, asked = open_backend(tmp_path), []
    open_ranges = where.store.open_ranges

    @contextmanager
    def counted(path: str):
        with open_ranges(path) as read_into:

            def count(start: int, buffer: memoryview) -> int:
                asked.append(len(buffer))
                return read_into(start, buffer)

            yield count

    monkeypatch.setattr(where.store, "open_ranges", counted)
    filled = torch.zeros(3, 1_500_000)
    read_tensors(where, catalog.read_manifest(where, "step-00000001"), {"x": cut(filled, tensor.shape, [wanted])}, check_files=None)
    assert torch.equal(filled[wanted.slices], tensor[wanted.slices])
    assert max(asked) <= SPAN + 2 * BLOCK
    assert sum(asked) <= wanted.count * 4 + wanted.sizes[0] * 2 * BLOCK


@settings(deadline=None)  # it writes files
@given(data=st.data())
def test_rows_of_another_vocabulary_are_found_by_token(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("rows")
    there = {f"t{number}": number for number in range(data.draw(st.integers(1, 12)))}
    names = data.draw(st.permutations([*there, *(f"new{number}" for number in range(data.draw(st.integers(0, 4))))]))
    here = {name: number for number, name in enumerate(names[: data.draw(st.integers(1, len(names)))])}
    alike = token_rows.shared_ranges(there, here)
    assert sum(run.count for run in alike) == len(here.keys() & there.keys())
    shape = (len(there) + 3, 5)  # with rows that are no token's
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    ends = sorted({0, tensor.numel(), *data.draw(st.lists(st.integers(0, tensor.numel()), max_size=3))})
    places = [place for a, b in pairwise(ends) for place in rectangles(shape, a, b)]
    saver(directory).save({"master/embedding.weight": cut(tensor, shape, places)}, progress(1))
    where = open_backend(directory)
    filled = torch.full((len(here) + 2, 5), -1.0)
    suited = token_rows.match_rows(catalog.read_manifest(where, "step-00000001"), alike, {"master/embedding.weight": tuple(filled.shape)})
    read_tensors(where, suited, {"master/embedding.weight": TensorViews.from_whole(filled)})
    for name, number in here.items():
        assert torch.equal(filled[number], tensor[there[name]] if name in there else torch.full((5,), -1.0))
    assert (filled[len(here) :] == -1).all()
    shutil.rmtree(directory)
