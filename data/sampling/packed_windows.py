"""Windows of whole documents, packed into bins. The packing of a shard is computed once, stored beside the shard, and memory-mapped.

piece-00000.train.packing-<version>-<width>-<stride>.bin    edges int64 [bins + 1], starts int64 [pieces], lengths int32 [pieces]
packing-<version>-<width>-<stride>.json                     the counts and hashes of all these files; written last
"""

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from manta.data.errors import AccessError, InputError
from manta.data.sampling import packing
from manta.data.sampling.packing import Bins, best_fit
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.manifest import Manifest
from manta.data.shards.shard import Count, Shard
from manta.data.shards.windows import Span, TokenStream, WindowDataset, Windows, WindowShape
from manta.data.storage.open_files import cache_maps


class ShardPacking(BaseModel, frozen=True, extra="forbid"):
    """The packing of one shard."""

    file: str
    bins: Count
    pieces: Count
    xxh3: str

    @property
    def bytes(self) -> int:
        return 8 * (self.bins + 1) + 12 * self.pieces


class CorpusPacking(BaseModel, frozen=True, extra="forbid"):
    """The packing of a corpus for one window shape: that of each train and validation shard."""

    fingerprint: str
    """The corpus's."""
    train: tuple[ShardPacking, ...]
    validation: tuple[ShardPacking, ...]


class PackedDataset(WindowDataset):
    """Bins of documents, numbered through all shards of all streams."""

    def __init__(self, streams: Sequence[TokenStream], packings: Sequence[ShardPacking], shape: WindowShape, *, padding: int) -> None:
        """packings: of each shard of each stream, in order. padding: the token id that fills up bins."""
        super().__init__([packing.bins for packing in packings])
        self._shards = [(stream, shard) for stream in streams for shard in range(len(stream.shards))]
        self._source_of_shard = np.repeat(np.arange(len(streams)), [len(stream.shards) for stream in streams])
        self._packings, self._width, self._padding = packings, shape.width, padding

    def read(self, windows: NDArray[np.integer]) -> Windows:
        shards, own = self._locate(windows)
        tokens_KW = np.full((len(own), self._width), self._padding, dtype=np.int64)
        documents_KW = np.full_like(tokens_KW, -1)
        for row, (shard, bin_number) in enumerate(zip(shards.tolist(), own.tolist(), strict=True)):
            bins, (stream, index) = self._bins(shard), self._shards[shard]
            tokens, filled = stream.map(index), 0
            first, end = bins.edges[bin_number : bin_number + 2].tolist()
            pieces = zip(bins.starts[first:end].tolist(), bins.lengths[first:end].tolist(), strict=True)
            for number, (start, length) in enumerate(pieces):
                tokens_KW[row, filled : filled + length] = tokens[start : start + length]
                documents_KW[row, filled : filled + length] = number
                filled += length
        return Windows(tokens=tokens_KW, documents=documents_KW, sources=self._source_of_shard[shards])

    def spans(self, window: int) -> list[Span]:
        (shard,), (own,) = self._locate(np.array([window]))
        bins, stream = self._bins(int(shard)), int(self._source_of_shard[shard])
        first, end = bins.edges[own : own + 2].tolist()
        pieces = zip(bins.starts[first:end].tolist(), bins.lengths[first:end].tolist(), strict=True)
        index = self._shards[shard][1]
        return [Span(stream, index, start, length) for start, length in pieces]

    @cache_maps
    def _bins(self, shard: int) -> Bins:
        packed = self._packings[shard]
        raw = self._shards[shard][0].home.map_file(packed.file, size=packed.bytes, xxh3=packed.xxh3)
        edges, starts, lengths = np.split(raw, np.cumsum([8 * (packed.bins + 1), 8 * packed.pieces]))
        return Bins(edges=edges.view(np.int64), starts=starts.view(np.int64), lengths=lengths.view(np.int32))


def find_packing(home: CorpusDirectory, corpus: Manifest, shape: WindowShape, *, contents: bool = False) -> CorpusPacking | None:
    """Return a corpus's packing, or None if it is missing, damaged, or another corpus's. contents: verify hashes, not only sizes."""
    found = recorded_packing(home, shape)
    if found is None or found.fingerprint != corpus.fingerprint:
        return None
    if (len(found.train), len(found.validation)) != (len(corpus.train.shards), len(corpus.validation.shards)):
        return None
    files = (*found.train, *found.validation)
    return None if any(home.file_problem(one.file, one.bytes, one.xxh3, contents=contents) for one in files) else found


def recorded_packing(home: CorpusDirectory, shape: WindowShape) -> CorpusPacking | None:
    """Return the packing's record, whether or not its files are intact."""
    try:
        return CorpusPacking.model_validate_json(home.read(_record(shape)))
    except AccessError:
        raise
    except (FileNotFoundError, ValidationError, InputError):
        return None


def load_packing(home: CorpusDirectory, corpus: Manifest, shape: WindowShape) -> CorpusPacking:
    """Return a corpus's packing. Raises InputError if the corpus is not packed for this shape."""
    found = find_packing(home, corpus, shape)
    if found is None:
        problem = "expected the corpus packed for this sequence length, got nothing or damaged files"
        raise InputError(f"{home.location(_record(shape))}: {problem}. Run `manta prepare`.")
    return found


def pack_corpus(home: CorpusDirectory, corpus: Manifest, shape: WindowShape) -> None:
    """Pack each shard for this shape, unless already done."""
    if find_packing(home, corpus, shape, contents=home.store.is_local) is None:
        train = tuple(_pack_shard(home, shard, shape) for shard in corpus.train.shards)
        validation = tuple(_pack_shard(home, shard, shape) for shard in corpus.validation.shards)
        record = CorpusPacking(fingerprint=corpus.fingerprint, train=train, validation=validation)
        home.store.write(_record(shape), record.model_dump_json(indent=1).encode())


def _pack_shard(home: CorpusDirectory, shard: Shard, shape: WindowShape) -> ShardPacking:
    bins = best_fit(home.read_index(shard).document_lengths(), shape.width, overlap=shape.width - shape.stride)
    content = bins.edges.tobytes() + bins.starts.tobytes() + bins.lengths.astype(np.int32).tobytes()
    name = f"{shard.index.removesuffix('.idx')}.{_record(shape).removesuffix('.json')}.bin"
    home.store.write(name, content)
    return ShardPacking(file=name, bins=len(bins), pieces=len(bins.starts), xxh3=xxhash.xxh3_64_hexdigest(content))


def _record(shape: WindowShape) -> str:
    """Return the name of the file that records a packing."""
    return f"packing-{packing.VERSION}-{shape.width}-{shape.stride}.json"
