"""Which rank writes what: every element once, and what several ranks hold is spread over them, so that all write about the same amount.

Planned once per layout, because shapes do not change between saves. A rank writes one safetensors file, whose length is known in advance.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from manta.trainer.checkpoint.manifest import BLOCK, Chunk, Dtype, StoredTensor, entry_name
from manta.trainer.checkpoint.rectangles import Rectangle, TensorViews

GPU_COPY = 64 * BLOCK  # bytes of GPU memory copied at once
MIN_SPLIT = 1 << 16  # elements: a smaller rectangle that several ranks hold is written by one of them
TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
}
DTYPE_NAMES: dict[torch.dtype, Dtype] = {dtype: name for name, dtype in TORCH_DTYPES.items()}

Region = tuple[str, Rectangle]  # a tensor's key, and a rectangle of it


class TensorRegions(NamedTuple):
    """What a rank holds of one tensor, without the data."""

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    rectangles: tuple[Rectangle, ...]


class WritePlan(NamedTuple):
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    """Type and whole shape, by key."""
    regions: list[list[Region]]
    """By rank, in the order of its file."""

    def stored_tensors(self, files: Mapping[int, int]) -> dict[str, StoredTensor]:
        """files: index of a rank's file in the checkpoint, by each rank that writes one."""
        chunks: dict[str, list[Chunk]] = {key: [] for key in self.tensors}
        for rank, regions in enumerate(self.regions):
            dtypes = [self.tensors[key][0] for key, _ in regions]
            for (key, rectangle), (start, _) in zip(regions, _file_layout(regions, dtypes)[1], strict=True):
                chunks[key].append(Chunk(files[rank], start, rectangle.offsets, rectangle.sizes))
        return {key: StoredTensor(DTYPE_NAMES[dtype], shape, tuple(chunks[key])) for key, (dtype, shape) in self.tensors.items()}


def regions_of(state: Mapping[str, TensorViews]) -> list[TensorRegions]:
    return [TensorRegions(key, held.shape, held.dtype, tuple(rectangle for rectangle, _ in held.views)) for key, held in state.items()]


def plan_writes(ranks: Sequence[Iterable[TensorRegions]]) -> WritePlan:
    """Return the plan for what each rank holds. Raises AssertionError unless every element is held, which any layout must ensure."""
    holders: dict[Region, list[int]] = {}
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for rank, held in enumerate(ranks):
        for tensor in held:
            tensors[tensor.key] = (tensor.dtype, tensor.shape)
            for rectangle in tensor.rectangles:
                holders.setdefault((tensor.key, rectangle), []).append(rank)
    covered = dict.fromkeys(tensors, 0)
    for key, rectangle in holders:
        covered[key] += rectangle.count
    for key, (_, shape) in tensors.items():
        assert covered[key] == math.prod(shape), f"{key}: ranks hold {covered[key]} of its {math.prod(shape)} elements"
    regions: list[list[Region]] = [[] for _ in ranks]
    load = [0] * len(regions)
    # First what one rank alone holds; then the largest rectangles, so that the smallest even out the rest.
    for (key, rectangle), owners in sorted(holders.items(), key=lambda item: (len(item[1]) > 1, -item[0][1].count)):
        parts = _split(rectangle, len(owners))
        writers = owners if len(parts) == len(owners) else [min(owners, key=load.__getitem__)]
        for part, writer in zip(parts, writers, strict=True):
            regions[writer].append((key, part))
            load[writer] += part.count * tensors[key][0].itemsize
    order = {key: number for number, key in enumerate(tensors)}
    for own in regions:  # wide elements first, so that each starts at a multiple of its width
        own.sort(key=lambda region: (-tensors[region[0]][0].itemsize, order[region[0]], region[1]))
    return WritePlan(tensors, regions)


def _split(rectangle: Rectangle, parts: int) -> list[Rectangle]:
    """Split a rectangle into parts of whole rows, if it is large enough and has enough rows."""
    rows = rectangle.sizes[0] if rectangle.sizes else 0
    if rectangle.count < MIN_SPLIT or rows < parts:
        return [rectangle]
    ends = [rows * part // parts for part in range(parts + 1)]
    first, others = rectangle.offsets[0], rectangle.offsets[1:]
    return [Rectangle((first + a, *others), (b - a, *rectangle.sizes[1:])) for a, b in pairwise(ends)]


class RankFile:
    """The safetensors file that this rank writes."""

    def __init__(self, regions: Sequence[Region], state: Mapping[str, TensorViews]) -> None:
        self.regions = regions
        self._header, self._spans = _file_layout(regions, [state[key].dtype for key, _ in regions])
        self.bytes = self._spans[-1][1] if regions else 0
        self._staging: Tensor | None = None

    def views(self, state: Mapping[str, TensorViews]) -> list[Tensor]:
        """Return views of the memory that training writes to."""
        return [_view(state[key], rectangle) for key, rectangle in self.regions]

    def stage(self, state: Mapping[str, TensorViews]) -> list[Tensor]:
        """Return copies, so that training may continue. Their memory is reused by the next save."""
        start, views = len(self._header), self.views(state)
        on_gpu = any(view.is_cuda for view in views)
        if self._staging is None:
            self._staging = torch.empty(max(self.bytes - start, 0), dtype=torch.uint8, pin_memory=on_gpu)
        copies = [
            self._staging[a - start : b - start].view(view.dtype).view(view.shape) for view, (a, b) in zip(views, self._spans, strict=True)
        ]
        for copy, view in zip(copies, views, strict=True):
            copy.copy_(view, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies

    def parts(self, views: Sequence[Tensor], hashes: list[str]) -> Iterator[memoryview]:
        """Yield the file in parts of at most a block. Replaces the content of `hashes` by the hashes of its blocks."""
        hashes.clear()
        hasher, room = xxhash.xxh3_64(), BLOCK
        for buffer in self._buffers(views):
            rest = buffer
            while rest:
                part, rest = rest[:room], rest[room:]
                hasher.update(part)
                room -= len(part)
                if not room:
                    hashes.append(hasher.hexdigest())
                    hasher, room = xxhash.xxh3_64(), BLOCK
                yield part
        if room < BLOCK:
            hashes.append(hasher.hexdigest())

    def _buffers(self, views: Sequence[Tensor]) -> Iterator[memoryview]:
        yield memoryview(self._header)
        for view in views:
            flat = view.detach().reshape(-1).view(torch.uint8)
            for start in range(0, len(flat), GPU_COPY):
                part: Any = flat[start : start + GPU_COPY].cpu().numpy()
                yield memoryview(part)


def _view(held: TensorViews, rectangle: Rectangle) -> Tensor:
    """Return the view of a rectangle of the whole tensor."""
    for outer, view in held.views:
        if outer.overlap(rectangle) == rectangle:
            return view[rectangle.within(outer).slices]
    raise KeyError(rectangle)


def _file_layout(regions: Sequence[Region], dtypes: Sequence[torch.dtype]) -> tuple[bytes, list[tuple[int, int]]]:
    """Return a safetensors file's header, and each region's first byte and end in the file."""
    entries: dict[str, object] = {}
    spans: list[tuple[int, int]] = []
    position = 0
    for (key, rectangle), dtype in zip(regions, dtypes, strict=True):
        end = position + rectangle.count * dtype.itemsize
        name = entry_name(key, rectangle.offsets)
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(rectangle.sizes), "data_offsets": [position, end]}
        spans.append((position, end))
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 64)
    start = len(header) + 8
    return len(header).to_bytes(8, "little") + header, [(a + start, b + start) for a, b in spans]
