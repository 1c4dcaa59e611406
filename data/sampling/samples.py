"""The samples of a run by number: any sample, on any rank, without state.

Sample number -> (source, the source's own sample number) by the mixture -> (epoch, window) by the source's order -> tokens -> examples.
Each step is a function of the config and the number alone. step_samples.py says which samples a step reads, trainer/dist/layout.py how
ranks share them.

A run counts the samples that it reads from 0: a read index. Sample numbers also count the samples that `data.skip` excludes.
Legend: K samples, T sequence length, S sources.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.hashing import hashed
from manta.data.objectives import masked
from manta.data.objectives.examples import Examples, sample_keys
from manta.data.objectives.objective import Objective
from manta.data.sampling.mixture import Mixture
from manta.data.sampling.order import BlockOrder, Order, Permutation
from manta.data.sampling.origins import DocumentOrigin, OriginFinder
from manta.data.sampling.packed_windows import PackedDataset, ShardPacking, load_packing
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.manifest import Manifest, PreparedData, digest, load_corpora
from manta.data.shards.shard import Shard
from manta.data.shards.windows import CutDataset, TokenStream, WindowDataset, Windows, WindowShape, check_indices
from manta.data.source_config import SourceConfig
from manta.data.tokenizer.tokenizer import Tokenizer

_SURELY_HELD_OUT = 20  # expected documents: that there are none has a chance of 2e-9, unless documents are equal
_SOURCE = 3  # the hash domain of the order keys of mixed sources

Numbers = NDArray[np.int64]
OpenCorpora = Sequence[tuple[CorpusDirectory, Manifest]]


class Samples:
    """A run's samples. Opening reads the manifests and the sizes of the shards; a shard is mapped on first use."""

    def __init__(self, prepared: PreparedData, data: DataConfig, tokens: TokenizerConfig, *, seed: int) -> None:
        """Raises InputError if a shard is missing, truncated or another run's, if there is too little text for a sample, or if the
        tokenizer lacks tokens that the objective needs.
        """
        self._seed = seed
        self._roots = prepared.corpora
        corpora = load_corpora(prepared, data.cache)
        _check_cache(data, corpora)
        tokenizer = Tokenizer(prepared.tokenizer, end_of_text=tokens.end_of_text)
        self._objective = Objective(data, tokenizer)
        self.sampler, self._validation = _open_datasets(data, corpora, self._objective.shape, seed=seed, padding=tokenizer.end_of_text)
        self._validation_order = Permutation(max(len(self._validation), 1), key=0)
        self.sequence_length = data.sequence_length
        self.tokenizer_vocabulary = max(corpus.vocabulary for _, corpus in corpora)
        self.validation_windows = len(self._validation)
        self.train_windows = sum(len(source.dataset) for source in self.sampler.sources)
        self.source_names = tuple(source.resolved_name for source in data.sources)
        self.token_bytes = tokenizer.token_bytes()
        self._origins = OriginFinder()

    def train(self, read_indices: NDArray[np.integer], *, sequence_length: int | None = None) -> Examples:
        """Return the examples of read indices [K] of any epoch: T / sequence_length for each sample if sequences are shorter."""
        samples = self.sampler.sample_numbers(read_indices)
        sources, own = self.sampler.locate(samples)
        rows = {int(source): np.flatnonzero(sources == source) for source in np.unique(sources)}
        parts = [self._read_source(source, own[at], samples[at]) for source, at in rows.items()]
        windows = parts[0] if len(parts) == 1 else Windows.concatenate(parts, np.argsort(np.concatenate(list(rows.values()))))
        return self._objective(windows, samples, seed=self._seed, sequence_length=sequence_length)

    def validation(self, indices: NDArray[np.integer]) -> Examples:
        """Return validation examples [K] in range(validation_windows). They are spread over all sources and independent of the seed."""
        samples = np.asarray(indices, dtype=np.int64)
        check_indices(samples, self.validation_windows)
        windows = self._read(self._validation, self._validation_order(samples).astype(np.int64), samples, seed=None)
        return self._objective(windows, samples, seed=None)

    def documents(self, sample: int) -> list[DocumentOrigin]:
        """Return the documents in the window of a sample number, in order, and where each came from. Of pairs, only part A's window.

        Unknown origins, of corpora from an earlier version or with damaged files, are None. Files are read to count their lines.
        """
        (index,), own = self.sampler.locate(np.array([sample]))
        source = self.sampler.sources[index]
        first = index if len(self.sampler.sources) > 1 else 0
        spans = source.dataset.spans(int(source.order(own)[1][0]))
        return self._origins.documents((source.streams[span.stream], self.source_names[first + span.stream], span) for span in spans)

    def _read_source(self, index: int, own: Numbers, samples: Numbers) -> Windows:
        self.sampler.prefetch(index, int(own[0]))
        source = self.sampler.sources[index]
        numbers = source.order(own)[1].astype(np.int64)
        windows = self._read(source.dataset, numbers, samples, seed=self._seed, by_part=not isinstance(source.order, Order))
        return windows if len(self.sampler.sources) == 1 else replace(windows, sources=np.full_like(samples, index))

    def _read(self, dataset: WindowDataset, numbers: Numbers, samples: Numbers, *, seed: int | None, by_part: bool = False) -> Windows:
        """by_part: draw part B of pairs from the same shard, because others may not be in the cache."""
        windows = dataset.read(numbers)
        if (highest := int(windows.tokens.view(np.uint64).max(initial=0))) >= self.tokenizer_vocabulary:  # a negative id is larger still
            problem = f"damaged; expected token ids below {self.tokenizer_vocabulary}, got {highest}"
            raise InputError(f"{', '.join(self._roots)}: {problem}. Run `manta data verify`, which names the file.")
        if not self._objective.needs_pairs:
            return windows
        first, count = dataset.part(numbers) if by_part else (0, len(dataset))
        others, next_sentence = masked.draw_pairs(sample_keys(samples, seed), numbers - first, count)
        return replace(windows, second=dataset.read(first + others).tokens, next_sentence=next_sentence)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SourceSampler:
    """One source of a mixture, or all sources read as one."""

    name: str
    streams: tuple[TokenStream, ...]
    dataset: WindowDataset
    order: Order | BlockOrder
    max_epochs: float | None

    @classmethod
    def create(
        cls, sources: Sequence[SourceConfig], streams: Sequence[TokenStream], dataset: WindowDataset, data: DataConfig, seed: int
    ) -> "SourceSampler":
        """In a mixture the order's key depends on the source's name alone, so other sources can be added and removed."""
        name = ", ".join(source.resolved_name for source in sources)
        if data.mixture:
            seed = int(hashed(seed, _SOURCE, int(digest(name)[:16], 16))[0])
        blocks = data.shuffle_shards
        order = Order(len(dataset), seed) if blocks is None else BlockOrder(dataset.counts, seed, shards_per_block=blocks)
        limits = [source.epochs for source in sources if source.epochs is not None]
        return cls(name=name, streams=tuple(streams), dataset=dataset, order=order, max_epochs=min(limits, default=None))

    def prefetch(self, number: int) -> None:
        """Start to download the remote shards of this source's sample `number` and of the samples after it."""
        shards = [(stream.home, shard) for stream in self.streams for shard in stream.shards]
        upcoming = range(len(shards)) if isinstance(self.order, Order) else self.order.upcoming_shards(number)
        by_home: dict[CorpusDirectory, list[Shard]] = {}
        for index in upcoming:
            by_home.setdefault(shards[index][0], []).append(shards[index][1])
        for home, upcoming_shards in by_home.items():
            home.prefetch(upcoming_shards)


class Sampler:
    """Maps the samples of a run to windows of sources."""

    def __init__(self, sources: Sequence[SourceSampler], data: DataConfig) -> None:
        """sources: one for each source in a mixture, in the config's order; otherwise a single one."""
        self.sources = tuple(sources)
        self._skip = data.skip
        names = [source.resolved_name for source in data.sources]
        # A stage starts at the first sample that starts at or after its tokens.
        stages = [
            (-(-stage.from_tokens // data.sequence_length), [stage.weights.get(name, 0.0) for name in names]) for stage in data.mixture
        ]
        self._mixture = Mixture(stages) if stages else None
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


def entropy(counts: NDArray[np.integer]) -> float:
    """Return the entropy in nats of the distribution with these counts [V]."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _open_datasets(data: DataConfig, corpora: OpenCorpora, shape: WindowShape, *, seed: int, padding: int) -> tuple[Sampler, WindowDataset]:
    """Return the sampler of the training datasets, one for each source of a mixture or one for all, and the validation dataset."""
    streams = [TokenStream(home, corpus.train.shards) for home, corpus in corpora]
    packings = [load_packing(home, corpus, shape) for home, corpus in corpora] if data.packing == "best_fit" else []
    train_packings = [packing.train for packing in packings]

    def dataset(streams: Sequence[TokenStream], packings: Sequence[tuple[ShardPacking, ...]], *, by_shard: bool) -> WindowDataset:
        if data.packing == "cut":
            return CutDataset(streams, shape, by_shard=by_shard)
        return PackedDataset(streams, [shard for shards in packings for shard in shards], shape, padding=padding)

    by_shard = data.shuffle_shards is not None
    singles = [dataset([stream], train_packings[at : at + 1], by_shard=by_shard) for at, stream in enumerate(streams)]
    held_out = [TokenStream(home, corpus.validation.shards) for home, corpus in corpora]
    validation = dataset(held_out, [packing.validation for packing in packings], by_shard=False)
    _check_text(data, corpora, [len(single) for single in singles], len(validation), shape)
    if data.mixture:
        sources = zip(data.sources, streams, singles, strict=True)
        samplers = [SourceSampler.create([one], [stream], single, data, seed) for one, stream, single in sources]
    else:
        together = dataset(streams, train_packings, by_shard=by_shard)
        samplers = [SourceSampler.create(data.sources, streams, together, data, seed)]
    return Sampler(samplers, data), validation


def _check_text(data: DataConfig, corpora: OpenCorpora, windows: Sequence[int], validation_windows: int, shape: WindowShape) -> None:
    """Raise InputError if a source has no train window, or all sources together have no validation window and could have one."""
    needed = f"at least {shape.width} for a sample of {data.sequence_length}"
    manifests = [corpus for _, corpus in corpora]
    without = "name other text as the validation of the source, or set data.validation to 0"
    for corpus, count in zip(manifests, windows, strict=True):
        if not count and corpus.validation.documents and not corpus.train.documents:
            problem = f"expected documents to train on in {corpus.source!r}, got all {corpus.validation.documents} held out"
            raise InputError(f"data.validation: {problem}. Equal documents are on the same side: {without}.")
        if not count:
            problem = f"expected {needed}, got {corpus.train.tokens} train tokens in {corpus.source!r}"
            raise InputError(f"data.sequence_length: {problem}. Add text, or lower data.sequence_length.")
    if validation_windows or (not data.validation and not any(source.validation for source in data.sources)):
        return
    held_out = max(corpus.validation.tokens for corpus in manifests)
    tokens = max(corpus.train.tokens + corpus.validation.tokens for corpus in manifests)
    documents = max(corpus.train.documents + corpus.validation.documents for corpus in manifests)
    # A hash assigns documents to train or validation. Suggest twice the tokens needed, three documents, and more than was configured.
    share = math.ceil(100 * max(2 * shape.width / tokens, 3 / documents, 2 * data.validation)) / 100
    remedy = f"Raise data.validation from {data.validation:g} to {share:g}, or set it to 0."
    if not held_out and documents * data.validation > _SURELY_HELD_OUT:
        remedy = f"Its documents seem to be equal, which are on the same side: {without}."
    elif share >= 0.5:
        return  # a few documents, to overfit to: the run says that it measures no validation loss
    raise InputError(f"data.validation: expected {needed}, got {held_out} validation tokens. {remedy}")


def _check_cache(data: DataConfig, corpora: OpenCorpora) -> None:
    """Raise InputError if the cache is too small for the corpus or, with data.shuffle_shards, for two blocks."""
    sizes = [size for home, corpus in corpora for shard in corpus.train.shards if (size := home.cached_bytes(shard))]
    validation = sum(home.cached_bytes(shard) for home, corpus in corpora for shard in corpus.validation.shards)
    if data.shuffle_shards is None:
        needed, remedy = sum(sizes), "Raise it, or set data.shuffle_shards to shuffle fewer shards at a time."
    else:
        blocks = 2 * data.shuffle_shards * (len(corpora) if data.mixture else 1)
        needed, remedy = sum(sorted(sizes, reverse=True)[:blocks]), "Raise it, or lower data.shuffle_shards."
    if sizes and needed + validation > data.cache.bytes:
        wanted = f"at least {needed + validation:,} for the shards in use at a time"
        raise InputError(f"data.cache.bytes: expected {wanted}, got {data.cache.bytes:,}. {remedy}")
