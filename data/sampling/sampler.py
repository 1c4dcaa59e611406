"""Maps a sample number to a source and a window in it: mixture weights, the order of each source, skipped samples and epoch limits.

step_samples.py says which samples a step reads, trainer/dist/layout.py how ranks share them.

A run counts the samples that it reads from 0: a read index. Sample numbers also count the samples that `data.skip` excludes.
Legend: K samples, S sources.
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
from manta.data.shards.manifest import digest
from manta.data.shards.windows import TokenStream, WindowDataset

_SOURCE = 3  # the hash domain of the order keys of mixed sources

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SourceSampler:
    """One source of a mixture, or all sources read as one."""

    name: str
    streams: tuple[TokenStream, ...]
    dataset: WindowDataset
    order: Order | BlockOrder
    max_epochs: float | None

    @classmethod
    def create(cls, name: str, streams: Sequence[TokenStream], dataset: WindowDataset, data: DataConfig, seed: int) -> "SourceSampler":
        """In a mixture the order's key depends on the source's name alone, so other sources can be added and removed."""
        if data.mixture:
            seed = int(hashed(seed, _SOURCE, int(digest(name)[:16], 16))[0])
        blocks = data.shuffle_shards
        order = Order(len(dataset), seed) if blocks is None else BlockOrder(dataset.counts, seed, shards_per_block=blocks)
        limits = [
            source.epochs for source in data.sources if source.epochs is not None and (source.resolved_name == name or not data.mixture)
        ]
        return cls(name=name, streams=tuple(streams), dataset=dataset, order=order, max_epochs=min(limits, default=None))

    def prefetch(self, number: int) -> None:
        """Start to download the remote shards of this source's sample `number` and of the samples after it."""
        shards = [(stream, shard) for stream in self.streams for shard in stream.shards]
        upcoming = range(len(shards)) if isinstance(self.order, Order) else self.order.upcoming_shards(number)
        for stream in self.streams:
            stream.home.prefetch(shards[index][1] for index in upcoming if shards[index][0] is stream)


class Sampler:
    """Maps the samples of a run to windows of sources."""

    def __init__(self, sources: Sequence[SourceSampler], data: DataConfig) -> None:
        """sources: one for each source in a mixture, in the config's order; otherwise a single one."""
        self.sources = tuple(sources)
        self._skip = data.skip
        self._mixture = build_mixture(data)
        self._prefetched_blocks: dict[int, object] = {}

    def sample_numbers(self, read_indices: NDArray[np.integer]) -> Numbers:
        """Return the sample numbers [K] of read indices [K]."""
        return sample_numbers(self._skip, read_indices)

    def locate(self, samples: Numbers) -> tuple[Numbers, Numbers]:
        """Return the source of each sample [K], and which of the source's own samples it is [K]."""
        return (np.zeros_like(samples), samples) if self._mixture is None else self._mixture(samples)

    def samples_by_source(self, count: int) -> list[int]:
        """Return how many of the first `count` samples that a run reads are from each source."""
        if self._mixture is None:
            return [count]
        last = self._sample_number(count)
        before = self._mixture.samples_before
        skipped = (before(min(end, last)) - before(min(first, last)) for first, end in self._skip)
        return (before(last) - sum(skipped)).tolist()

    def check_epochs(self, count: int) -> None:
        """Raise InputError if a run of `count` samples reads a source more often than its `epochs` allows."""
        end = self._sample_number(count)
        by_source = [end] if self._mixture is None else self._mixture.samples_before(end).tolist()
        for source, samples in zip(self.sources, by_source, strict=True):
            size = len(source.dataset)
            if source.max_epochs is not None and samples > source.max_epochs * size:
                epochs = f"{samples / size:.2f} epochs ({samples:,} samples of {size:,})"
                remedy = "Shorten the run, lower its weight, or raise epochs."
                raise InputError(f"data.sources: {source.name}: expected at most {source.max_epochs:g} epochs, got {epochs}. {remedy}")

    def prefetch(self, index: int, number: int) -> None:
        """Once per block of source `index`, start the downloads for its sample `number` and those after it."""
        source = self.sources[index]
        block = 0 if isinstance(source.order, Order) else source.order.block(number)
        if self._prefetched_blocks.get(index) != block:
            self._prefetched_blocks[index] = block
            source.prefetch(number)

    def _sample_number(self, read_index: int) -> int:
        return int(self.sample_numbers(np.array([read_index]))[0])


def sample_numbers(skip: Sequence[tuple[int, int]], read_indices: NDArray[np.integer]) -> Numbers:
    """Return the sample numbers [K] of read indices [K], without those in the ranges [first, end) of `skip`."""
    numbers = np.array(read_indices, dtype=np.int64)
    for first, end in skip:
        numbers[numbers >= first] += end - first
    return numbers


def build_mixture(data: DataConfig) -> Mixture | None:
    """Return the mixture of a config, if it has one. A stage starts at the first sample that starts at or after its tokens."""
    if not data.mixture:
        return None
    names = [source.resolved_name for source in data.sources]
    stages = [(-(-stage.from_tokens // data.sequence_length), stage.weights) for stage in data.mixture]
    return Mixture([(start, [weights.get(name, 0.0) for name in names]) for start, weights in stages])
