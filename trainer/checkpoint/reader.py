"""Out of a checkpoint's files into memory: the blocks that hold what is wanted, each checked against its hash before it is used."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from manta.trainer.checkpoint.backend import CheckpointBackend
from manta.trainer.checkpoint.errors import CheckpointError, unreadable
from manta.trainer.checkpoint.manifest import BLOCK, Checkpoint, File
from manta.trainer.checkpoint.rectangles import Rectangle
from manta.trainer.checkpoint.shards import Pieces
from manta.trainer.checkpoint.write_plan import TORCH

SPAN = 4 * BLOCK  # bytes read at once: what they are checked and copied from is still in the cache


@dataclass(frozen=True, slots=True)
class Want:
    """A part of a chunk, and where it goes."""

    start: int  # of the chunk in its file
    sizes: tuple[int, ...]  # of the chunk
    part: Rectangle
    dtype: torch.dtype
    target: Tensor


def read(
    where: CheckpointBackend,
    checkpoint: Checkpoint,
    state: Mapping[str, Pieces],
    *,
    hashes: bool = True,
    rest: tuple[int, int] | None = (0, 1),
) -> None:
    """Fills `state`, whose keys and shapes are the checkpoint's, from the bytes that it is made of.

    hashes: each block that is read is checked against its hash. rest: (rank, ranks), between whom the files are dealt out to be looked at
    as a whole: their size, and where hashes are checked the blocks that nobody wants. None leaves that. Raises CheckpointError where a
    file is not as its manifest says.
    """
    name = checkpoint.at.rpartition("/")[2]
    wants = _wants(checkpoint, state)
    for number, file in enumerate(checkpoint.files):
        mine = rest is not None and number % rest[1] == rest[0]
        if number not in wants and not mine:
            continue
        at = f"{checkpoint.at}/{file.name}"
        try:
            if mine and (size := where.size(name, file.name)) != file.bytes:
                raise CheckpointError(f"{at}: bytes: got {size}, wants {file.bytes}")
            with where.open_ranges(name, file.name) as read_into:
                blocks = Blocks(read_into, file, at, checked=hashes)
                for want in sorted(wants.get(number, []), key=lambda want: want.start):
                    _copy(blocks, want)
                if mine and hashes:
                    blocks.check_rest()
        except OSError as error:
            raise unreadable(at, error) from None


def _wants(checkpoint: Checkpoint, state: Mapping[str, Pieces]) -> dict[int, list[Want]]:
    wants: dict[int, list[Want]] = {}
    for key, pieces in state.items():
        stored = checkpoint.tensors[key]
        for place, view in pieces.held:
            for chunk in stored.chunks:
                if (both := place.overlap(chunk.place)) is not None:
                    target = view[both.within(place).slices]
                    part = both.within(chunk.place)
                    wants.setdefault(chunk.file, []).append(Want(chunk.start, chunk.place.sizes, part, TORCH[stored.dtype], target))
    return wants


class Blocks:
    """A file's bytes by ranges, in rising order if it is to be quick."""

    def __init__(self, read_into: Callable[[int, memoryview], int], file: File, at: str, *, checked: bool) -> None:
        self._read_into, self._file, self._at, self._checked = read_into, file, at, checked
        self._memory = memoryview(bytearray(min(SPAN + 2 * BLOCK, -(-file.bytes // BLOCK) * BLOCK)))
        self._first = self._end = 0  # blocks that are in memory
        self._unseen = set(range(len(file.xxh3)))

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop), no more than SPAN; good until the next call. Raises CheckpointError where they are not as written."""
        first, end = start // BLOCK, -(-stop // BLOCK)
        if not self._first <= first < self._end:
            self._first = self._end = first
        elif end > self._end:  # what is here already is not read again
            kept = (self._end - first) * BLOCK
            here = (first - self._first) * BLOCK
            self._memory[:kept] = bytes(self._memory[here : here + kept])
            self._first = first
        if end > self._end:
            self._fill(end)
        begins = self._first * BLOCK
        return self._memory[start - begins : stop - begins]

    def check_rest(self) -> None:
        """Reads what nobody has asked for."""
        for block in sorted(self._unseen):
            self.read(block * BLOCK, min((block + 1) * BLOCK, self._file.bytes))

    def _fill(self, end: int) -> None:
        start, stop = self._end * BLOCK, min(end * BLOCK, self._file.bytes)
        into = self._memory[start - self._first * BLOCK : stop - self._first * BLOCK]
        if (count := self._read_into(start, into)) != len(into):
            raise CheckpointError(f"{self._at}: bytes: got {start + count}, wants {self._file.bytes}")
        for block in range(self._end, end):
            if self._checked:
                part = into[block * BLOCK - start : (block + 1) * BLOCK - start]
                if (found := xxhash.xxh3_64_hexdigest(part)) != (wanted := self._file.xxh3[block]):
                    raise CheckpointError(f"{self._at}: xxh3 of bytes {block * BLOCK}...: got {found}, wants {wanted}")
            self._unseen.discard(block)
        self._end = end


def _copy(blocks: Blocks, want: Want) -> None:
    width = want.dtype.itemsize
    strides: list[int] = []
    step = width
    for size in reversed(want.sizes):
        strides.insert(0, step)
        step *= size
    first = want.start + sum(offset * stride for offset, stride in zip(want.part.offsets, strides, strict=True))
    for start, target in _spans(first, want.target, strides, width):
        raw = blocks.read(start, start + _extent(target, strides, width))
        source = torch.frombuffer(raw, dtype=want.dtype)
        target.copy_(source.as_strided(target.shape, [stride // width for stride in strides]))


def _spans(first: int, target: Tensor, strides: list[int], width: int) -> Iterator[tuple[int, Tensor]]:
    """A part in parts, each of which lies close together: no more than SPAN bytes from its first to its last, and no long gaps."""
    wide = next((d for d, size in enumerate(target.shape) if size > 1), None)
    if wide is None:
        yield first, target
        return
    inner = _extent(target.narrow(wide, 0, 1), strides, width)
    gapped = strides[wide] - inner >= BLOCK
    if not gapped and _extent(target, strides, width) <= SPAN:
        yield first, target
        return
    rows = 1 if gapped or inner > SPAN else 1 + (SPAN - inner) // strides[wide]
    for row in range(0, target.shape[wide], rows):
        few = target.narrow(wide, row, min(rows, target.shape[wide] - row))
        yield from _spans(first + row * strides[wide], few, strides, width)


def _extent(target: Tensor, strides: list[int], width: int) -> int:
    return sum((size - 1) * stride for size, stride in zip(target.shape, strides, strict=True)) + width
