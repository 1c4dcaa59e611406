"""Asynchronous saves, what each rank writes, and reads of any rectangle from any chunks."""

import math
import shutil
from collections.abc import Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import are_equal, load_tensors, open_writer, progress, random_tensors, whole_views
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.launch.config import load
from manta.trainer.checkpoint import catalog, token_rows
from manta.trainer.checkpoint.errors import SaveError
from manta.trainer.checkpoint.manifest import BLOCK
from manta.trainer.checkpoint.reader import SPAN, read_tensors
from manta.trainer.checkpoint.rectangles import Rectangle, TensorViews, rectangles
from manta.trainer.checkpoint.save_policy import SavePolicy
from manta.trainer.checkpoint.storage import open_backend
from manta.trainer.checkpoint.write_plan import MIN_SPLIT, TensorRegions, plan_writes


def test_an_asynchronous_save_holds_the_tensors_of_its_start(tmp_path, monkeypatch):
    tensors = random_tensors()
    writer = open_writer(tmp_path, asynchronous=True)
    write = writer.backend.write
    may_start = []

    def write_later(*arguments) -> str:
        while not may_start:
            pass
        return write(*arguments)

    monkeypatch.setattr(writer.backend, "write", write_later)
    writer.save(whole_views(tensors), progress(1), wait=False)
    assert writer.is_busy
    assert open_backend(tmp_path).names() == []
    for tensor in tensors.values():
        tensor.zero_()
    may_start.append(True)
    writer.finish()
    assert not writer.is_busy
    assert are_equal(load_tensors(tmp_path, "step-00000001"), random_tensors())
    memory = writer._file._staging.data_ptr()
    writer.save(whole_views(random_tensors(2)), progress(2), wait=False)
    writer.finish()
    assert are_equal(load_tensors(tmp_path, "step-00000002"), random_tensors(2))
    assert writer._file._staging.data_ptr() == memory, "each save uses the same memory"


def test_a_failed_asynchronous_save_is_raised_once(tmp_path, monkeypatch):
    writer = open_writer(tmp_path, asynchronous=True)

    def raise_disk_full(*_) -> str:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    with monkeypatch.context() as patch:
        patch.setattr(writer.backend, "write", raise_disk_full)
        writer.save(whole_views(random_tensors()), progress(1), wait=False)
        wait([writer._pending])
        assert writer.outcome == "failed"
        with pytest.raises(SaveError, match=r"rank 0: .*/x: No space left on device: needs 2,8.* bytes, and .* were free\. Free"):
            writer.finish()
    assert writer.outcome is None
    writer.finish()
    writer.save(whole_views(random_tensors(2)), progress(2))
    assert are_equal(load_tensors(tmp_path, "step-00000002"), random_tensors(2))


# What ranks write and read


@given(st.data())
def test_ranks_write_each_element_once_and_similar_amounts(data):
    ranks = data.draw(st.integers(1, 6))
    held: list[list[TensorRegions]] = [[] for _ in range(ranks)]
    total = 0
    for number in range(data.draw(st.integers(1, 5))):
        shape = tuple(data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=2)))
        owners = data.draw(st.sampled_from([size for size in range(1, ranks + 1) if ranks % size == 0]))
        count = math.prod(shape)  # split flat over the owners; ranks / owners ranks hold each part
        total += 4 * count
        for rank in range(ranks):
            owner = rank % owners
            parts = rectangles(shape, count * owner // owners, count * (owner + 1) // owners)
            held[rank].append(TensorRegions(f"master/{number}", shape, torch.float32, tuple(parts)))
    plan = plan_writes(held)
    covered = {key: np.zeros(shape, dtype=int) for key, (_, shape) in plan.tensors.items()}
    for rank, regions in enumerate(plan.regions):
        for key, part in regions:
            covered[key][part.slices] += 1
            assert any(outer.overlap(part) == part for tensor in held[rank] if tensor.key == key for outer in tensor.rectangles)
    assert all((count == 1).all() for count in covered.values())
    sizes = [sum(4 * part.count for _, part in regions) for regions in plan.regions]
    largest = max((4 * tensor.rectangles[0].count for tensor in held[0] if tensor.rectangles), default=0)
    assert max(sizes) <= total / ranks + 4 * MIN_SPLIT * 3 + largest


def test_a_layout_that_loses_a_part_is_not_saved():
    half = TensorRegions("master/x", (4, 4), torch.float32, (Rectangle((0, 0), (2, 4)),))
    with pytest.raises(AssertionError, match="master/x: ranks hold 8 of its 16 elements"):
        plan_writes([[half], [half]])


def views_of(tensor: torch.Tensor, shape: Sequence[int], parts: list[Rectangle]) -> TensorViews:
    return TensorViews(tuple(shape), tensor.dtype, tuple((part, tensor[part.slices]) for part in parts))


def drawn_parts(data, shape: Sequence[int]) -> list[Rectangle]:
    """A tensor as rectangles, split flat at any elements."""
    count = math.prod(shape)
    ends = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=3))})
    return [part for a, b in pairwise(ends) for part in rectangles(shape, a, b)]


@settings(deadline=None)  # it writes files
@given(data=st.data(), shape=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_any_rectangle_is_read_from_any_chunks(tmp_path_factory, data, shape):
    directory = tmp_path_factory.mktemp("parts")
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    open_writer(directory).save({"x": views_of(tensor, shape, drawn_parts(data, shape))}, progress(1))
    backend = open_backend(directory)
    offsets = [data.draw(st.integers(0, size - 1)) for size in shape]
    sizes = tuple(data.draw(st.integers(1, size - offset)) for size, offset in zip(shape, offsets, strict=True))
    part = Rectangle(tuple(offsets), sizes)
    loaded = torch.full(shape, -1.0)
    read_tensors(backend, catalog.read_manifest(backend, "step-00000001"), {"x": views_of(loaded, shape, [part])})
    expected = torch.full(shape, -1.0)
    expected[part.slices] = tensor[part.slices]
    assert torch.equal(loaded, expected)
    shutil.rmtree(directory)


@pytest.mark.parametrize("part", [Rectangle((0, 0), (3, 1_500_000)), Rectangle((0, 700_000), (3, 9)), Rectangle((1, 3), (2, 1_499_990))])
def test_a_large_tensor_is_read_in_spans_of_needed_blocks_alone(tmp_path, part, monkeypatch):
    tensor = torch.arange(4_500_000, dtype=torch.float32).view(3, 1_500_000)  # rows of 6 MB: two do not fit a span
    assert 2 * tensor.stride(0) * 4 > SPAN
    open_writer(tmp_path).save({"x": TensorViews.from_whole(tensor)}, progress(1))
    backend, reads = open_backend(tmp_path), []
    open_ranges = backend.store.open_ranges

    @contextmanager
    def count_reads(path: str):
        with open_ranges(path) as read_into:

            def counted(start: int, buffer: memoryview) -> int:
                reads.append(len(buffer))
                return read_into(start, buffer)

            yield counted

    monkeypatch.setattr(backend.store, "open_ranges", count_reads)
    loaded = torch.zeros(3, 1_500_000)
    state = {"x": views_of(loaded, tensor.shape, [part])}
    read_tensors(backend, catalog.read_manifest(backend, "step-00000001"), state, check_files=None)
    assert torch.equal(loaded[part.slices], tensor[part.slices])
    assert max(reads) <= SPAN + 2 * BLOCK
    assert sum(reads) <= part.count * 4 + part.sizes[0] * 2 * BLOCK


@settings(deadline=None)  # it writes files
@given(data=st.data())
def test_rows_of_another_vocabulary_are_matched_by_token(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("rows")
    stored_ids = {f"t{number}": number for number in range(data.draw(st.integers(1, 12)))}
    tokens = data.draw(st.permutations([*stored_ids, *(f"new{number}" for number in range(data.draw(st.integers(0, 4))))]))
    current_ids = {token: number for number, token in enumerate(tokens[: data.draw(st.integers(1, len(tokens)))])}
    ranges = token_rows.shared_ranges(stored_ids, current_ids)
    assert sum(ids.count for ids in ranges) == len(current_ids.keys() & stored_ids.keys())
    shape = (len(stored_ids) + 3, 5)  # with padding rows
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    open_writer(directory).save({"master/embedding.weight": views_of(tensor, shape, drawn_parts(data, shape))}, progress(1))
    backend = open_backend(directory)
    loaded = torch.full((len(current_ids) + 2, 5), -1.0)
    checkpoint = catalog.read_manifest(backend, "step-00000001")
    matched = token_rows.match_rows(checkpoint, ranges, {"master/embedding.weight": tuple(loaded.shape)})
    read_tensors(backend, matched, {"master/embedding.weight": TensorViews.from_whole(loaded)})
    for token, number in current_ids.items():
        assert torch.equal(loaded[number], tensor[stored_ids[token]] if token in stored_ids else torch.full((5,), -1.0))
    assert (loaded[len(current_ids) :] == -1).all()
    shutil.rmtree(directory)


def test_a_request_that_cannot_be_read_for_a_moment_is_no_failure(workspace, tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        request = tmp_path / "save-now"
        request.symlink_to("x" * 300)  # an error for root as well, as a network disk's would be
        policy = SavePolicy(None, None, None, load(workspace.config_file), request, step=0, window=())
        policy._last_poll -= 10
        assert not policy.is_due()
        request.unlink()
        request.touch()
        policy._last_poll -= 10
        assert policy.is_due()
    finally:
        dist.destroy_process_group()
