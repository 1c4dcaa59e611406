"""Windows of token shards, by number. `CutDataset` cuts running text into windows; `packed_windows` fills them with whole documents.

Legend: K windows, W tokens per window.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.shard import Shard
from manta.data.storage.open_files import cache_maps

Numbers = NDArray[np.int64]


class WindowShape(NamedTuple):
    """Tokens per window, and from the start of one window to the start of the next. Long documents are cut the same way."""

    width: int
    stride: int

    def count(self, tokens: int) -> int:
        """Return the number of windows of continuous text."""
        return max(0, tokens - self.width + self.stride) // self.stride


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """The tokens of K windows."""

    tokens: Numbers  # [K, W]
    sources: Numbers | None = None  # [K]: the source that each window is from; None: of several at once
    documents: Numbers | None = None  # [K, W]: each token's document in its window, -1 for padding; None: not numbered yet
    second: Numbers | None = None  # [K, W]: the windows that part B of next-sentence pairs is cut from
    next_sentence: Numbers | None = None  # [K]: 1 if `second` is a random window, 0 if it is the same one

    @classmethod
    def concatenate(cls, parts: Sequence[Self], order: NDArray[np.intp]) -> Self:
        """Return the windows of all parts, indexed by `order`. All parts have the same fields."""
        arrays = {name: [getattr(part, name) for part in parts] for name in (field.name for field in fields(cls))}
        return cls(**{name: np.concatenate(found)[order] for name, found in arrays.items() if found[0] is not None})


class TokenStream:
    """The tokens of one split of one corpus: its shards end to end."""

    def __init__(self, home: CorpusDirectory, shards: Sequence[Shard]) -> None:
        self.home = home
        self.shards = tuple(shards)
        self.starts = np.array([0, *accumulate(shard.tokens for shard in shards)], dtype=np.int64)
        self.tokens = int(self.starts[-1])

    def gather(self, starts: Numbers, width: int) -> Numbers:
        """Return tokens [start, start + width) for each start [K]: [K, width]."""
        out = np.empty((len(starts), width), dtype=np.int64)
        owners = np.searchsorted(self.starts, starts, side="right") - 1
        offsets = starts - self.starts[owners]
        crosses = offsets + width > self.starts[owners + 1] - self.starts[owners]
        for shard in np.unique(owners[~crosses]).tolist():
            rows = (owners == shard) & ~crosses
            if rows.all():
                out[:] = self._view(shard, width)[offsets]
            else:
                out[rows] = self._view(shard, width)[offsets[rows]]
        for row in np.flatnonzero(crosses):
            out[row] = self._read_across(int(owners[row]), int(offsets[row]), width)
        return out

    @cache_maps
    def map(self, shard: int) -> NDArray[Any]:
        return self.home.tokens(self.shards[shard])

    @cache_maps
    def _view(self, shard: int, width: int) -> NDArray[Any]:
        """Return a view whose row i is tokens [i, i + width): indexing it with many starts copies rows without a Python loop."""
        return np.lib.stride_tricks.sliding_window_view(self.map(shard), width)

    def _read_across(self, shard: int, offset: int, width: int) -> Numbers:
        """Return a window that starts in one shard and ends in a later one."""
        parts: list[NDArray[np.integer]] = []
        while width:
            part = self.map(shard)[offset : offset + width]
            parts.append(part)
            shard, offset, width = shard + 1, 0, width - len(part)
        return np.concatenate(parts).astype(np.int64)


class Span(NamedTuple):
    """Tokens [start, start + length) of a shard."""

    stream: int
    shard: int
    start: int
    length: int


def check_indices(indices: NDArray[np.integer], count: int) -> None:
    """Raise IndexError unless all indices are in range(count)."""
    if indices.size and (indices.min() < 0 or indices.max() >= count):
        raise IndexError(f"windows: expected indices below {count}, got {indices.min()} to {indices.max()}")


class WindowDataset(ABC):
    """Windows numbered through parts: shards or streams. A stream is a source's."""

    def __init__(self, counts: Sequence[int]) -> None:
        """counts: windows of each part."""
        self.counts = np.array(counts, dtype=np.int64)
        self._ends = np.cumsum(self.counts)
        self._firsts = self._ends - self.counts
        self._len = int(self.counts.sum())

    def __len__(self) -> int:
        return self._len

    @abstractmethod
    def read(self, windows: NDArray[np.integer]) -> Windows:
        """Return windows [K] in range(len(self))."""

    @abstractmethod
    def spans(self, window: int) -> list[Span]:
        """Return which tokens a window holds, in order and without padding. No shard is read."""

    def part(self, windows: Numbers) -> tuple[Numbers, Numbers]:
        """Return the first window [K] and the number of windows [K] of the part that each of these windows is in."""
        parts, own = self._locate(windows)
        return windows - own, self.counts[parts]

    def _locate(self, windows: NDArray[np.integer]) -> tuple[Numbers, Numbers]:
        """Return the part of each window [K], and its number in the part [K]. Raises IndexError if one is out of range."""
        windows = np.asarray(windows, dtype=np.int64)
        check_indices(windows, len(self))
        parts = np.searchsorted(self._ends, windows, side="right")
        return parts, windows - self._firsts[parts]


class CutDataset(WindowDataset):
    """Running text cut into windows, each `stride` tokens after the previous one, through all streams.

    Windows cross shard boundaries unless `by_shard` is set, as it is for a corpus that is larger than the cache.
    """

    def __init__(self, streams: Sequence[TokenStream], shape: WindowShape, *, by_shard: bool) -> None:
        spans = [
            (index, int(start), int(end))
            for index, stream in enumerate(streams)
            for start, end in (zip(stream.starts[:-1], stream.starts[1:], strict=True) if by_shard else (stream.starts[[0, -1]],))
        ]
        super().__init__([shape.count(end - start) for _, start, end in spans])
        self._streams, self._shape = streams, shape
        self._stream_of_part = np.array([index for index, _, _ in spans], dtype=np.int64)
        self._starts = np.array([start for _, start, _ in spans], dtype=np.int64)

    def read(self, windows: NDArray[np.integer]) -> Windows:
        parts, own = self._locate(windows)
        owners, starts, width = self._stream_of_part[parts], self._starts[parts] + own * self._shape.stride, self._shape.width
        if len(self._streams) == 1:
            return Windows(tokens=self._streams[0].gather(starts, width), sources=owners)
        tokens_KW = np.empty((len(starts), width), dtype=np.int64)
        for index in np.unique(owners).tolist():
            rows = owners == index
            tokens_KW[rows] = self._streams[index].gather(starts[rows], width)
        return Windows(tokens=tokens_KW, sources=owners)

    def spans(self, window: int) -> list[Span]:
        (part,), (own,) = self._locate(np.array([window]))
        index, start = int(self._stream_of_part[part]), int(self._starts[part] + own * self._shape.stride)
        edges, end, spans = self._streams[index].starts, start + self._shape.width, list[Span]()
        shard = int(np.searchsorted(edges, start, side="right")) - 1
        while start < end:
            length = min(int(edges[shard + 1]), end) - start
            spans.append(Span(index, shard, start - int(edges[shard]), length))
            start, shard = start + length, shard + 1
        return spans
