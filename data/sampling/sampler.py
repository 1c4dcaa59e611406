"""Which window of which source a sample is: the mixture, each source's order, what is skipped, and how often a source may be read.

Legend: K samples asked for, S sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manta.data.config import DataConfig
from manta.data.errors import InputError
from manta.data.hashing import hashed
from manta.data.sampling.mixture import Mixture
from manta.data.sampling.order import BlockOrder, Order
from manta.data.sampling.packed_windows import Packed
from manta.data.sampling.windows import Cut, Stream
from manta.data.shards.manifest import digest

_SOURCE = 3  # the stream of hashes that the orders of mixed sources are keyed by

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draw:
    """What samples are drawn from: one source of a mixture, or all sources as one."""

    name: str
    streams: tuple[Stream, ...]
    windows: Cut | Packed
    order: Order | BlockOrder
    epochs: float | None  # how often it may be read

    @classmethod
    def of(cls, name: str, streams: Sequence[Stream], windows: Cut | Packed, data: DataConfig, seed: int) -> "Draw":
        """Of a mixture, the key of an order is of its source's name: other sources may come and go."""
        if data.mixture:
            seed = int(hashed(seed, _SOURCE, int(digest(name)[:16], 16))[0])
        blocks = data.shuffle_shards
        order = Order(windows.total, seed) if blocks is None else BlockOrder(windows.counts, seed, at_a_time=blocks)
        caps = [source.epochs for source in data.sources if source.epochs is not None and (source.called == name or not data.mixture)]
        return cls(name=name, streams=tuple(streams), windows=windows, order=order, epochs=min(caps, default=None))

    def ahead(self, number: int) -> None:
        """Has what its sample `number` and those after it want fetched, where it is remote."""
        places = [(stream, shard) for stream in self.streams for shard in stream.shards]
        wanted = range(len(places)) if isinstance(self.order, Order) else self.order.ahead(number)
        for stream in self.streams:
            stream.home.ahead(places[index][1] for index in wanted if places[index][0] is stream)


class Draws:
    """Where each sample of a run comes from. A run counts what it reads from 0; sample numbers leave out what config skips."""

    def __init__(self, draws: Sequence[Draw], data: DataConfig) -> None:
        """draws: of each source, in order, where they are mixed; else one, of all."""
        self.all = tuple(draws)
        self._skip = data.skip
        self._mixture = mixture_of(data)
        self._told: dict[int, object] = {}

    def numbered(self, count: NDArray[np.integer]) -> Numbers:
        """What a run reads, counted from 0 [K] -> sample numbers [K]."""
        return numbered(self._skip, count)

    def located(self, samples: Numbers) -> tuple[Numbers, Numbers]:
        """Sample numbers [K] -> what they are drawn from [K], and which of its samples each is [K]."""
        return (np.zeros_like(samples), samples) if self._mixture is None else self._mixture(samples)

    def taken(self, count: int) -> list[int]:
        """Of each draw, its samples among the first `count` that a run reads."""
        if self._mixture is None:
            return [count]
        last = self._reached(count)
        skipped = (self._before(min(end, last)) - self._before(min(first, last)) for first, end in self._skip)
        return (self._before(last) - sum(skipped)).tolist()

    def check_epochs(self, count: int) -> None:
        """Raises InputError where a run of so many samples would read a source more often than it may."""
        reached = self._reached(count)
        own = [reached] if self._mixture is None else self._before(reached).tolist()
        for draw, samples in zip(self.all, own, strict=True):
            if draw.epochs is not None and samples > draw.epochs * draw.windows.total:
                got = f"{samples / draw.windows.total:.2f} epochs ({samples:,} samples of {draw.windows.total:,})"
                remedy = "shorten the run, lower its weight, or raise epochs"
                raise InputError(f"data.sources: {draw.name}: got {got}, wants at most {draw.epochs:g}; {remedy}")

    def read_ahead(self, index: int, number: int) -> None:
        """Once a block: what comes next has to be on its way before it is asked for."""
        draw = self.all[index]
        block = 0 if isinstance(draw.order, Order) else draw.order.block(number)
        if self._told.get(index) != block:
            self._told[index] = block
            draw.ahead(number)

    def _reached(self, count: int) -> int:
        return int(self.numbered(np.array([count]))[0])

    def _before(self, number: int) -> Numbers:
        assert self._mixture is not None
        return self._mixture.taken(number)


def numbered(skip: Sequence[tuple[int, int]], count: NDArray[np.integer]) -> Numbers:
    """What a run reads, counted from 0 [K] -> sample numbers [K]: those in the ranges [first, end) are left out."""
    numbers = np.array(count, dtype=np.int64)
    for first, end in skip:
        numbers[numbers >= first] += end - first
    return numbers


def mixture_of(data: DataConfig) -> Mixture | None:
    """A stage begins at the first sample that starts at its tokens or later."""
    if not data.mixture:
        return None
    names = [source.called for source in data.sources]
    begins = [-(-stage.from_tokens // data.sequence_length) for stage in data.mixture]
    return Mixture([(begin, [stage.weights.get(name, 0.0) for name in names]) for begin, stage in zip(begins, data.mixture, strict=True)])
