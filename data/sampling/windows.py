"""Windows of token shards, by number: running text cut into windows of one width. `packed` has bins of whole documents.

Legend: K windows asked for, W width of a window, S shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from manta.data.shards.corpus_directory import Home
from manta.data.shards.shard import Shard

_OPEN_SHARDS = 256  # mapped at a time: each holds a file descriptor

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A window is so wide, and the next one begins so many tokens further on; or so a long document is cut."""

    width: int
    stride: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Text:
    """What stands in K windows."""

    tokens: Numbers  # [K, W]
    documents: Numbers | None = None  # [K, W]: which of its window's documents a token is of, -1 for padding; None: nobody has said

    @classmethod
    def joined(cls, parts: "Sequence[Self]", order: NDArray[np.intp]) -> "Self":
        """The windows of all parts, picked by `order`."""
        documents = [part.documents for part in parts if part.documents is not None]
        tokens = np.concatenate([part.tokens for part in parts])[order]
        return cls(tokens=tokens, documents=np.concatenate(documents)[order] if documents else None)


class Stream:
    """The tokens of one split of one corpus, end to end over its shards."""

    def __init__(self, home: Home, shards: Sequence[Shard]) -> None:
        self.home = home
        self.shards = tuple(shards)
        self.starts = np.array([0, *accumulate(shard.tokens for shard in shards)], dtype=np.int64)
        self.map = lru_cache(_OPEN_SHARDS)(self._map)
        self._views = lru_cache(_OPEN_SHARDS)(self._view)

    def gather(self, starts: Numbers, width: int) -> Numbers:
        """Tokens [start, start + width) for each start [K] -> [K, width]."""
        out = np.empty((len(starts), width), dtype=np.int64)
        owners = np.searchsorted(self.starts, starts, side="right") - 1
        offsets = starts - self.starts[owners]
        over = offsets + width > self.starts[owners + 1] - self.starts[owners]
        for shard in np.unique(owners[~over]).tolist():
            here = (owners == shard) & ~over
            if here.all():
                out[:] = self._views(shard, width)[offsets]
            else:
                out[here] = self._views(shard, width)[offsets[here]]
        for row in np.flatnonzero(over):
            out[row] = self._across(int(owners[row]), int(offsets[row]), width)
        return out

    def _map(self, shard: int) -> NDArray[Any]:
        return self.home.tokens(self.shards[shard])

    def _view(self, shard: int, width: int) -> NDArray[Any]:
        """Row i is tokens [i, i + width): indexed by many starts, it copies their rows with no loop in Python."""
        return np.lib.stride_tricks.sliding_window_view(self.map(shard), width)

    def _across(self, shard: int, offset: int, width: int) -> Numbers:
        """A window that begins in one shard and ends in another."""
        parts: list[NDArray[np.integer]] = []
        while width:
            part = self.map(shard)[offset : offset + width]
            parts.append(part)
            shard, offset, width = shard + 1, 0, width - len(part)
        return np.concatenate(parts).astype(np.int64)


class Cut:
    """Windows of running text, each `stride` tokens after the one before, numbered through all streams.

    They reach over the ends of shards; where shards are kept apart, as a corpus too large for the cache is read, they do not.
    """

    def __init__(self, streams: Sequence[Stream], shape: Shape, *, apart: bool) -> None:
        width, stride = shape.width, shape.stride
        parts = [
            (index, int(begin), int(end - begin))
            for index, stream in enumerate(streams)
            for begin, end in (
                zip(stream.starts[:-1], stream.starts[1:], strict=True) if apart else ((stream.starts[0], stream.starts[-1]),)
            )
        ]
        self.counts = np.array([max(0, tokens - width + stride) // stride for _, _, tokens in parts], dtype=np.int64)
        self.total = int(self.counts.sum())
        self._firsts = np.cumsum(self.counts) - self.counts
        self._streams, self._width, self._stride = streams, width, stride
        self._owners = np.array([index for index, _, _ in parts], dtype=np.int64)
        self._begins = np.array([begin for _, begin, _ in parts], dtype=np.int64)

    def part(self, windows: Numbers) -> tuple[Numbers, Numbers]:
        """Of windows [K], the first window of the shard or stream that each is of, and how many that has."""
        parts, own = located(windows, self._firsts, self.counts)
        return windows - own, self.counts[parts]

    def read(self, windows: NDArray[np.integer]) -> Text:
        """Windows [K] in range(total) -> their text."""
        parts, own = located(windows, self._firsts, self.counts)
        owners, starts = self._owners[parts], self._begins[parts] + own * self._stride
        if len(self._streams) == 1:
            return Text(tokens=self._streams[0].gather(starts, self._width))
        tokens_KW = np.empty((len(starts), self._width), dtype=np.int64)
        for index in np.unique(owners).tolist():
            here = owners == index
            tokens_KW[here] = self._streams[index].gather(starts[here], self._width)
        return Text(tokens=tokens_KW)


def located(windows: NDArray[np.integer], firsts: Numbers, counts: Numbers) -> tuple[Numbers, Numbers]:
    """Windows [K] -> which part each is of, and which of that part's it is. Parts without windows are passed over."""
    windows, total = np.asarray(windows, dtype=np.int64), int(counts.sum())
    if windows.size and (windows.min() < 0 or windows.max() >= total):
        raise IndexError(f"windows {windows.min()} to {windows.max()}: there are {total}")
    parts = np.searchsorted(firsts + counts, windows, side="right")
    return parts, windows - firsts[parts]
