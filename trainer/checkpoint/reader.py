"""From a checkpoint's files into tensors. Only blocks that are needed are read, and each is checked against its hash before it is used.

Memory that is loaded starts as NaN, and what no chunk fills is an error.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import xxhash
from pydantic_core import from_json
from torch import Tensor

from manta.trainer.checkpoint.backend import CheckpointBackend
from manta.trainer.checkpoint.errors import CheckpointError, read_error
from manta.trainer.checkpoint.manifest import BLOCK, Checkpoint, CheckpointFile, entry_name
from manta.trainer.checkpoint.rectangles import Rectangle, TensorViews
from manta.trainer.checkpoint.write_plan import TORCH_DTYPES

MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
SPAN = 4 * BLOCK  # bytes read at once, so that they are still in the CPU's cache when they are checked and copied


class ChunkPart(NamedTuple):
    """A part of a chunk, and the tensor to copy it to."""

    start: int  # byte of the chunk in its file
    sizes: tuple[int, ...]  # of the chunk
    part: Rectangle
    dtype: torch.dtype
    target: Tensor


def read_tensors(
    backend: CheckpointBackend,
    checkpoint: Checkpoint,
    state: Mapping[str, TensorViews],
    *,
    check_hashes: bool = True,
    check_files: tuple[int, int] | None = (0, 1),
) -> None:
    """Fill `state`, with the keys and shapes of the checkpoint. Raises CheckpointError if a file does not match its manifest, or if a part
    of `state` is not in the checkpoint.

    check_hashes: whether each block that is read is checked against its hash.
    check_files: (rank, ranks): the ranks divide the files, and check each one's size and, with check_hashes, also the blocks that `state`
    does not need. None: skip both.
    """
    parts = _chunk_parts(checkpoint, state)
    for index, file in enumerate(checkpoint.files):
        checks_file = check_files is not None and index % check_files[1] == check_files[0]
        if index not in parts and not checks_file:
            continue
        path, location = f"{checkpoint.name}/{file.name}", f"{checkpoint.location}/{file.name}"
        try:
            if checks_file and (size := backend.store.stat(path).size) != file.bytes:
                raise CheckpointError(f"{location}: expected {file.bytes} bytes, got {size}")
            with backend.store.open_ranges(path) as read_into:
                blocks = BlockReader(read_into, file, location, check_hashes=check_hashes)
                for part in sorted(parts.get(index, []), key=lambda part: part.start):
                    _copy(blocks, part)
                if checks_file and check_hashes:
                    blocks.check_rest()
        except OSError as error:
            raise read_error(location, error) from None


def read_whole(backend: CheckpointBackend, checkpoint: Checkpoint, keys: Iterable[str], *, check_files: bool = True) -> dict[str, Tensor]:
    """Return whole tensors by key. Raises CheckpointError if they are damaged, or need more memory than there is.

    check_files: whether the files' other bytes are checked as well.
    """
    tensors: dict[str, Tensor] = {}
    for key in keys:
        stored = checkpoint.tensors[key]
        dtype = TORCH_DTYPES[stored.dtype]
        try:
            tensors[key] = torch.full(stored.shape, math.nan if dtype.is_floating_point else 0, dtype=dtype)
        except (RuntimeError, MemoryError):
            needed = f"{math.prod(stored.shape) * dtype.itemsize:,} bytes"
            raise CheckpointError(f"{checkpoint.location}: {key}: needs {needed} of memory, more than this machine has") from None
    state = {key: TensorViews.from_whole(tensor) for key, tensor in tensors.items()}
    read_tensors(backend, checkpoint, state, check_files=(0, 1) if check_files else None)
    return tensors


def check_sizes(backend: CheckpointBackend, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if a file is missing, or of another size than the manifest says."""
    for file in checkpoint.files:
        location = f"{checkpoint.location}/{file.name}"
        try:
            size = backend.store.stat(f"{checkpoint.name}/{file.name}").size
        except OSError as error:
            raise read_error(location, error) from None
        if size != file.bytes:
            raise CheckpointError(f"{location}: expected {file.bytes} bytes, got {size}")


def check_headers(backend: CheckpointBackend, checkpoint: Checkpoint, *, rank: int = 0, ranks: int = 1) -> None:
    """Raises CheckpointError unless the headers of the files name the same chunks at the same bytes as the manifest.

    The ranks divide the files. Only headers are read.
    """
    mine = range(rank, len(checkpoint.files), ranks)
    expected: dict[int, dict[str, tuple[str, list[int], int, int]]] = {index: {} for index in mine}
    for key, stored in checkpoint.tensors.items():
        for chunk in stored.chunks:
            if chunk.file in expected:
                stop = chunk.start + math.prod(chunk.sizes) * TORCH_DTYPES[stored.dtype].itemsize
                expected[chunk.file][entry_name(key, chunk.offsets)] = (stored.dtype, list(chunk.sizes), chunk.start, stop)
    for index, entries in expected.items():
        file = checkpoint.files[index]
        location = f"{checkpoint.location}/{file.name}"
        try:
            with backend.store.open_ranges(f"{checkpoint.name}/{file.name}") as read_into:
                found = _read_header(read_into, file.bytes)
        except OSError as error:
            raise read_error(location, error) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{location}: expected the header of a safetensors file, got other bytes") from None
        if found != entries:
            name = next((name for name in entries if entries[name] != found.get(name)), None)
            raise CheckpointError(f"{location}: header: expected the manifest's chunks, got others{f', such as {name}' if name else ''}")


def _read_header(read_into: Callable[[int, memoryview], int], size: int) -> dict[str, tuple[str, list[int], int, int]]:
    """Return each entry's dtype, shape, first byte and end in the file. Raises ValueError, KeyError, … if there is no header."""

    def read(start: int, count: int) -> bytes:
        buffer = bytearray(count)
        if read_into(start, memoryview(buffer)) < count:
            raise ValueError("truncated")
        return bytes(buffer)

    start = 8 + int.from_bytes(read(0, 8), "little")
    if start > min(size, MAX_HEADER):
        raise ValueError("longer than the file")
    header: dict[str, Any] = from_json(read(8, start - 8))
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (header[name]["dtype"], header[name]["shape"], start + first, start + end) for name, (first, end) in spans.items()}


def _chunk_parts(checkpoint: Checkpoint, state: Mapping[str, TensorViews]) -> dict[int, list[ChunkPart]]:
    """Return what to copy, by index of the file."""
    parts: dict[int, list[ChunkPart]] = {}
    for key, held in state.items():
        stored = checkpoint.tensors[key]
        for rectangle, view in held.views:
            missing = 0 if key in checkpoint.partial else rectangle.count
            for chunk in stored.chunks:
                if (both := rectangle.overlap(chunk.rectangle)) is not None:
                    missing -= both.count
                    target, part = view[both.within(rectangle).slices], both.within(chunk.rectangle)
                    copy = ChunkPart(chunk.start, chunk.sizes, part, TORCH_DTYPES[stored.dtype], target)
                    parts.setdefault(chunk.file, []).append(copy)
            if missing > 0:
                raise CheckpointError(f"{checkpoint.location}: {key}: {missing} of {rectangle.count} elements are in no chunk")
    return parts


class BlockReader:
    """Reads ranges of a file by whole blocks; fast if the ranges are in ascending order."""

    def __init__(self, read_into: Callable[[int, memoryview], int], file: CheckpointFile, location: str, *, check_hashes: bool) -> None:
        self._read_into, self._file, self._location, self._check_hashes = read_into, file, location, check_hashes
        self._buffer = memoryview(bytearray(min(SPAN + 2 * BLOCK, -(-file.bytes // BLOCK) * BLOCK)))
        self._first = self._end = 0  # blocks in the buffer
        self._unread = set(range(len(file.xxh3)))

    def read(self, start: int, stop: int) -> memoryview:
        """Return bytes [start, stop), at most SPAN, valid until the next call. Raises CheckpointError if they are damaged."""
        first, end = start // BLOCK, -(-stop // BLOCK)
        if not self._first <= first < self._end:
            self._first = self._end = first
        elif end > self._end:  # blocks that are in the buffer are not read again
            kept = (self._end - first) * BLOCK
            offset = (first - self._first) * BLOCK
            self._buffer[:kept] = bytes(self._buffer[offset : offset + kept])
            self._first = first
        if end > self._end:
            self._fill(end)
        buffer_start = self._first * BLOCK
        return self._buffer[start - buffer_start : stop - buffer_start]

    def check_rest(self) -> None:
        """Read the blocks that were not read yet."""
        for block in sorted(self._unread):
            self.read(block * BLOCK, min((block + 1) * BLOCK, self._file.bytes))

    def _fill(self, end: int) -> None:
        start, stop = self._end * BLOCK, min(end * BLOCK, self._file.bytes)
        target = self._buffer[start - self._first * BLOCK : stop - self._first * BLOCK]
        if (count := self._read_into(start, target)) != len(target):
            raise CheckpointError(f"{self._location}: expected {self._file.bytes} bytes, got {start + count}")
        for block in range(self._end, end):
            if self._check_hashes:
                content = target[block * BLOCK - start : (block + 1) * BLOCK - start]
                if (xxh3 := xxhash.xxh3_64_hexdigest(content)) != (expected := self._file.xxh3[block]):
                    raise CheckpointError(f"{self._location}: xxh3 of bytes {block * BLOCK}...: expected {expected}, got {xxh3}")
            self._unread.discard(block)
        self._end = end


def _copy(blocks: BlockReader, part: ChunkPart) -> None:
    width = part.dtype.itemsize
    strides = [width * math.prod(part.sizes[dimension + 1 :]) for dimension in range(len(part.sizes))]
    first = part.start + sum(offset * stride for offset, stride in zip(part.part.offsets, strides, strict=True))
    for start, target in _spans(first, part.target, strides, width):
        content = blocks.read(start, start + _extent(target, strides, width))
        source = torch.frombuffer(content, dtype=part.dtype)
        target.copy_(source.as_strided(target.shape, [stride // width for stride in strides]))


def _spans(first: int, target: Tensor, strides: list[int], width: int) -> Iterator[tuple[int, Tensor]]:
    """Yield parts of the target that are dense in the file: at most SPAN bytes from first to last, without long gaps."""
    outer = next((d for d, size in enumerate(target.shape) if size > 1), None)
    if outer is None:
        yield first, target
        return
    inner = _extent(target.narrow(outer, 0, 1), strides, width)
    has_gaps = strides[outer] - inner >= BLOCK
    if not has_gaps and _extent(target, strides, width) <= SPAN:
        yield first, target
        return
    rows = 1 if has_gaps or inner > SPAN else 1 + (SPAN - inner) // strides[outer]
    for row in range(0, target.shape[outer], rows):
        some = target.narrow(outer, row, min(rows, target.shape[outer] - row))
        yield from _spans(first + row * strides[outer], some, strides, width)


def _extent(target: Tensor, strides: list[int], width: int) -> int:
    return sum((size - 1) * stride for size, stride in zip(target.shape, strides, strict=True)) + width
