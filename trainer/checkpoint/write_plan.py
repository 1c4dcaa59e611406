"""Which rank writes what: each piece of the whole once, what several ranks hold alike spread over them, so that all write about as much.

Planned once for each layout: shapes do not change from one save to the next. A share is one safetensors file, its length known before.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import xxhash
from torch import Tensor

from manta.trainer.checkpoint.manifest import BLOCK, Chunk, Stored
from manta.trainer.checkpoint.rectangles import Rectangle
from manta.trainer.checkpoint.shards import Pieces

AT_ONCE = 64 * BLOCK
SPREAD = 1 << 16  # elements from which on what several ranks hold is cut up between them, and not given to one
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}
TORCH = {name: dtype for dtype, name in DTYPES.items()}

Located = tuple[str, Rectangle]  # of which tensor


@dataclass(frozen=True, slots=True)
class Held:
    """What a rank tells of one tensor: no data."""

    key: str
    whole: tuple[int, ...]
    dtype: torch.dtype
    places: tuple[Rectangle, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What each rank writes, in the order of its file."""

    wholes: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    shares: list[list[Located]]

    def tensors(self, files: Mapping[int, int]) -> dict[str, Stored]:
        """files: by rank that writes anything, which of the checkpoint's files that is."""
        chunks: dict[str, list[Chunk]] = {key: [] for key in self.wholes}
        for rank, share in enumerate(self.shares):
            dtypes = [self.wholes[key][0] for key, _ in share]
            for (key, place), (start, _) in zip(share, _layout(share, dtypes)[1], strict=True):
                chunks[key].append(Chunk(files[rank], start, place))
        return {key: Stored(DTYPES[dtype], shape, tuple(chunks[key])) for key, (dtype, shape) in self.wholes.items()}


def held(state: Mapping[str, Pieces]) -> list[Held]:
    return [Held(key, pieces.whole, pieces.dtype, tuple(place for place, _ in pieces.held)) for key, pieces in state.items()]


def plan(ranks: Sequence[Iterable[Held]]) -> Plan:
    """From what each rank holds. Raises AssertionError where some tensor would not be covered once, which no layout may lead to."""
    holders: dict[Located, list[int]] = {}
    wholes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for rank, tensors in enumerate(ranks):
        for tensor in tensors:
            wholes[tensor.key] = (tensor.dtype, tensor.whole)
            for place in tensor.places:
                holders.setdefault((tensor.key, place), []).append(rank)
    covered = dict.fromkeys(wholes, 0)
    for key, place in holders:
        covered[key] += place.count
    for key, (_, whole) in wholes.items():
        assert covered[key] == math.prod(whole), f"{key}: ranks hold {covered[key]} of its {math.prod(whole)} elements"
    shares: list[list[Located]] = [[] for _ in ranks]
    load = [0] * len(shares)
    for (key, place), own in sorted(holders.items(), key=_leeway):
        parts = _cut(place, len(own))
        takers = own if len(parts) == len(own) else [min(own, key=load.__getitem__)]
        for part, taker in zip(parts, takers, strict=True):
            shares[taker].append((key, part))
            load[taker] += part.count * wholes[key][0].itemsize
    order = {key: number for number, key in enumerate(wholes)}
    for share in shares:  # wide elements first, so that each lies where its width divides
        share.sort(key=lambda item: (-wholes[item[0]][0].itemsize, order[item[0]], item[1]))
    return Plan(wholes, shares)


def _leeway(piece: tuple[Located, list[int]]) -> tuple[bool, int]:
    """Pieces that one rank alone holds come first; of the others the largest do, so that the smallest even out what is left."""
    (_, place), own = piece
    return len(own) > 1, -place.count


def _cut(place: Rectangle, parts: int) -> list[Rectangle]:
    """Into as many rectangles of whole rows, where it is worth it and there are as many."""
    rows = place.sizes[0] if place.sizes else 0
    if place.count < SPREAD or rows < parts:
        return [place]
    ends = [rows * part // parts for part in range(parts + 1)]
    first, others = place.offsets[0], place.offsets[1:]
    return [Rectangle((first + a, *others), (b - a, *place.sizes[1:])) for a, b in pairwise(ends)]


class Share:
    """What this rank writes, as one safetensors file."""

    def __init__(self, places: Sequence[Located], state: Mapping[str, Pieces]) -> None:
        self.places = places
        dtypes = [state[key].dtype for key, _ in places]
        self._header, self._spans = _layout(places, dtypes)
        self.bytes = self._spans[-1][1] if places else 0
        self._staged: Tensor | None = None

    def views(self, state: Mapping[str, Pieces]) -> list[Tensor]:
        """Of the memory that training writes to."""
        return [_find(state[key], place) for key, place in self.places]

    def stage(self, state: Mapping[str, Pieces]) -> list[Tensor]:
        """A copy, in memory that is kept for the next time: training may go on."""
        start, views = len(self._header), self.views(state)
        on_gpu = any(view.is_cuda for view in views)
        if self._staged is None:
            self._staged = torch.empty(max(self.bytes - start, 0), dtype=torch.uint8, pin_memory=on_gpu)
        copies = [
            self._staged[a - start : b - start].view(view.dtype).view(view.shape) for view, (a, b) in zip(views, self._spans, strict=True)
        ]
        for copy, view in zip(copies, views, strict=True):
            copy.copy_(view, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies

    def body(self, views: Sequence[Tensor], hashes: list[str]) -> Iterator[memoryview]:
        """The file, in parts of no more than a block; `hashes` is filled anew, with those of its blocks."""
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
            for start in range(0, len(flat), AT_ONCE):  # of a GPU's memory, no more than this is copied at a time
                part: Any = flat[start : start + AT_ONCE].cpu().numpy()
                yield memoryview(part)


def _find(pieces: Pieces, place: Rectangle) -> Tensor:
    """What lies at this place of the whole, out of what is held of it."""
    for outer, view in pieces.held:
        if outer.overlap(place) == place:
            return view[place.within(outer).slices]
    raise KeyError(place)


def _layout(places: Sequence[Located], dtypes: Sequence[torch.dtype]) -> tuple[bytes, list[tuple[int, int]]]:
    """A safetensors file's header, and where in the file each piece lies, first byte and end."""
    told: dict[str, object] = {}
    spans: list[tuple[int, int]] = []
    position = 0
    for (key, place), dtype in zip(places, dtypes, strict=True):
        end = position + place.count * dtype.itemsize
        name = f"{key}@{','.join(map(str, place.offsets))}"
        told[name] = {"dtype": DTYPES[dtype], "shape": list(place.sizes), "data_offsets": [position, end]}
        spans.append((position, end))
        position = end
    header = json.dumps(told, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 64)
    begins = len(header) + 8
    return len(header).to_bytes(8, "little") + header, [(a + begins, b + begins) for a, b in spans]
