"""Bins of whole documents, as windows by number. What a bin holds is worked out once, kept beside the shard, and mapped.

piece-00000.train.packing-<version>-<width>-<stride>.bin    edges int64 [bins + 1], starts int64 [pieces], lengths int32 [pieces]
packing-<version>-<width>-<stride>.json                     how many of each, and their hashes; written last
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from manta.data.errors import InputError
from manta.data.sampling import packing
from manta.data.sampling.packing import Bins, best_fit
from manta.data.sampling.windows import Numbers, Shape, Stream, Text, located
from manta.data.shards.corpus_directory import Home
from manta.data.shards.manifest import Manifest
from manta.data.shards.shard import Shard
from manta.data.storage.remote import is_remote

_OPEN = 256  # packings mapped at a time


class Packing(BaseModel, frozen=True, extra="forbid"):
    """How one shard is packed."""

    file: str
    bins: int
    pieces: int
    xxh3: str

    @property
    def bytes(self) -> int:
        return 8 * (self.bins + 1) + 12 * self.pieces


class Packings(BaseModel, frozen=True, extra="forbid"):
    """How a corpus is packed for one width: each shard of its train and of its validation split."""

    fingerprint: str
    """The corpus's."""
    train: tuple[Packing, ...]
    validation: tuple[Packing, ...]


class Packed:
    """Bins, numbered through all shards of all streams."""

    def __init__(self, streams: Sequence[Stream], packings: Sequence[Packing], shape: Shape, *, filler: int) -> None:
        """packings: of each shard of each stream, in order. filler: the id of what stands for nothing."""
        self.counts = np.array([packing.bins for packing in packings], dtype=np.int64)
        self.total = int(self.counts.sum())
        self._firsts = np.cumsum(self.counts) - self.counts
        self._places = [(stream, shard) for stream in streams for shard in range(len(stream.shards))]
        self._packings, self._width, self._filler = packings, shape.width, filler
        self._bins = lru_cache(_OPEN)(self._map)

    def part(self, windows: Numbers) -> tuple[Numbers, Numbers]:
        """Of bins [K], the first bin of the shard that each is of, and how many that has."""
        parts, own = located(windows, self._firsts, self.counts)
        return windows - own, self.counts[parts]

    def read(self, windows: NDArray[np.integer]) -> Text:
        """Bins [K] in range(total) -> their text, filled up."""
        shards, own = located(windows, self._firsts, self.counts)
        tokens_KW = np.full((len(own), self._width), self._filler, dtype=np.int64)
        documents_KW = np.full_like(tokens_KW, -1)
        for row, (shard, at) in enumerate(zip(shards.tolist(), own.tolist(), strict=True)):
            bins, (stream, index) = self._bins(shard), self._places[shard]
            tokens, filled = stream.map(index), 0
            first, end = bins.edges[at : at + 2].tolist()
            held = zip(bins.starts[first:end].tolist(), bins.lengths[first:end].tolist(), strict=True)
            for number, (start, length) in enumerate(held):
                tokens_KW[row, filled : filled + length] = tokens[start : start + length]
                documents_KW[row, filled : filled + length] = number
                filled += length
        return Text(tokens=tokens_KW, documents=documents_KW)

    def _map(self, shard: int) -> Bins:
        packed = self._packings[shard]
        raw = self._places[shard][0].home.mapped(packed.file, size=packed.bytes, xxh3=packed.xxh3)
        edges, starts, lengths = np.split(raw, np.cumsum([8 * (packed.bins + 1), 8 * packed.pieces]))
        return Bins(edges=edges.view(np.int64), starts=starts.view(np.int64), lengths=lengths.view(np.int32))


def find_packings(home: Home, corpus: Manifest, shape: Shape, *, contents: bool = False) -> Packings | None:
    """What `pack` has written, or None where it is not there, damaged, or of another corpus; sizes only, or where asked, every byte."""
    found = recorded_packings(home, shape)
    if found is None or found.fingerprint != corpus.fingerprint:
        return None
    files = (*found.train, *found.validation)
    return None if any(home.file_problem(one.file, one.bytes, one.xxh3, contents=contents) for one in files) else found


def recorded_packings(home: Home, shape: Shape) -> Packings | None:
    """What the record says, whatever became of the files that it names."""
    try:
        return Packings.model_validate_json(home.read(_record(shape)))
    except (FileNotFoundError, ValidationError):
        return None


def packings(home: Home, corpus: Manifest, shape: Shape) -> Packings:
    """Raises InputError where the corpus was not packed for this width."""
    found = find_packings(home, corpus, shape)
    if found is None:
        wants = "the corpus packed for this sequence length"
        raise InputError(f"{home.at(_record(shape))}: missing, or what it names is damaged; wants {wants}: run `manta prepare`")
    return found


def pack(home: Home, corpus: Manifest, shape: Shape) -> None:
    """Pack each shard for this width, where that is not done."""
    if find_packings(home, corpus, shape, contents=not is_remote(home.root)) is None:
        train, validation = (tuple(_pack(home, shard, shape) for shard in split.shards) for split in (corpus.train, corpus.validation))
        found = Packings(fingerprint=corpus.fingerprint, train=train, validation=validation)
        home.write(_record(shape), found.model_dump_json(indent=1).encode())


def _pack(home: Home, shard: Shard, shape: Shape) -> Packing:
    bins = best_fit(home.index(shard).document_lengths(), shape.width, shared=shape.width - shape.stride)
    content = bins.edges.tobytes() + bins.starts.tobytes() + bins.lengths.astype(np.int32).tobytes()
    name = f"{shard.index.removesuffix('.idx')}.{_record(shape).removesuffix('.json')}.bin"
    home.write(name, content)
    return Packing(file=name, bins=len(bins), pieces=len(bins.starts), xxh3=xxhash.xxh3_64_hexdigest(content))


def _record(shape: Shape) -> str:
    return f"packing-{packing.VERSION}-{shape.width}-{shape.stride}.json"
