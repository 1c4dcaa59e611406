"""Every byte of a prepared corpus, held against what its manifest says: hashes, counts of documents and tokens, and ids.

All that is wrong is told, not only the first of it. A file is read once, by one of a few threads.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Lock

import numpy as np
import xxhash

from manta.data.errors import InputError
from manta.data.sampling.packed_windows import recorded_packing
from manta.data.sampling.windows import WindowShape
from manta.data.shards import manifest
from manta.data.shards.corpus_directory import Home
from manta.data.shards.manifest import Manifest
from manta.data.shards.shard import Shard, parse_index
from manta.data.storage.store import open_store

_THREADS = 8

Tell = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Of a file: what it is, and what it should be."""

    path: str
    got: str
    wanted: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """A file of token ids, and the shards that lie in it; or an index, and its one shard; or what else a corpus has."""

    path: str
    size: int
    xxh3: str
    vocabulary: int = 0
    shards: tuple[Shard, ...] = ()
    is_index: bool = False

    def damage(self, tell: Tell) -> Damage | None:
        try:
            return self._damage(tell)
        except FileNotFoundError:
            return Damage(path=self.path, got="no such file", wanted=f"{self.size:,} bytes")
        except (OSError, InputError) as error:
            return Damage(path=self.path, got=f"an error ({error})", wanted=f"{self.size:,} bytes")

    def _damage(self, tell: Tell) -> Damage | None:
        size = open_store(self.path).stat().size
        if size != self.size:
            return Damage(path=self.path, got=f"{size:,} bytes", wanted=f"{self.size:,}")
        digest, begin, index = xxhash.xxh3_64(), 0, list[bytes]()
        lowest, highest = 0, 0
        for block in open_store(self.path).blocks(size):
            digest.update(block)
            if self.is_index:
                index.append(bytes(block))
            else:
                for ids in self._ids(block, begin):
                    lowest, highest = min(lowest, int(ids.min())), max(highest, int(ids.max()))
            begin += len(block)
            tell(len(block))
        if digest.hexdigest() != self.xxh3:
            return Damage(path=self.path, got=f"xxh3 {digest.hexdigest()}", wanted=self.xxh3)
        if self.is_index:
            return _index_damage(self.path, b"".join(index), self.shards[0])
        if self.shards and (lowest < 0 or highest >= self.vocabulary):
            return Damage(path=self.path, got=f"id {lowest if lowest < 0 else highest}", wanted=f"ids below {self.vocabulary}")
        return None

    def _ids(self, block: memoryview, begin: int) -> Iterator[np.ndarray[tuple[int], np.dtype[np.integer]]]:
        """Those in a block of the file's bytes. What is no shard's, as a header, counts for nothing."""
        for shard in self.shards:
            dtype = np.dtype(shard.dtype)
            first = max(shard.offset, begin)
            end = min(shard.offset + shard.tokens * dtype.itemsize, begin + len(block))
            if first < end:
                yield np.frombuffer(block[first - begin : end - begin], dtype)


def verify(corpora: Sequence[tuple[Home, Manifest]], shape: WindowShape, *, tell: Tell) -> list[Damage]:
    """All that is damaged, in the order of the files. shape: also how it is packed for these windows. tell: of the bytes that were read."""
    files, lock = [file for home, corpus in corpora for file in _files(home, corpus, shape)], Lock()

    def told(read: int) -> None:
        with lock:
            tell(read)

    damaged = [damage for home, corpus in corpora if (damage := _counts(home, corpus))]
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        damaged += [damage for damage in threads.map(partial(_File.damage, tell=told), files) if damage]
    return damaged


def size(corpora: Iterable[tuple[Home, Manifest]], shape: WindowShape) -> tuple[int, int]:
    """How many files, and bytes in them."""
    files = [file for home, corpus in corpora for file in _files(home, corpus, shape)]
    return len(files), sum(file.size for file in files)


def _files(home: Home, corpus: Manifest, shape: WindowShape) -> list[_File]:
    """Several shards may lie in one file, where a corpus is read as others wrote it."""
    shards = (*corpus.train.shards, *corpus.validation.shards)
    of_file: dict[str, list[Shard]] = {}
    for shard in shards:
        of_file.setdefault(home.at(shard.file), []).append(shard)
    found: list[_File] = []
    for path, within in of_file.items():
        first = within[0]
        found.append(_File(path=path, size=first.bin_bytes, xxh3=first.bin_xxh3, vocabulary=corpus.vocabulary, shards=tuple(within)))
        found += [
            _File(path=home.at(shard.index), size=shard.idx_bytes, xxh3=shard.idx_xxh3, shards=(shard,), is_index=True) for shard in within
        ]
    packed = recorded_packing(home, shape)
    for packing in (*packed.train, *packed.validation) if packed else ():
        found.append(_File(path=home.at(packing.file), size=packing.bytes, xxh3=packing.xxh3))
    return found


def _counts(home: Home, corpus: Manifest) -> Damage | None:
    """Whether a manifest agrees with itself."""
    path = home.at(manifest.NAME)
    for name, split in (("train", corpus.train), ("validation", corpus.validation)):
        for what in ("tokens", "documents", "text_bytes"):
            said, summed = getattr(split, what), sum(getattr(shard, what) for shard in split.shards)
            if said != summed:
                return Damage(path=path, got=f"{name}.{what} {said:,}", wanted=f"{summed:,}, the sum of its shards")
    for shard in (*corpus.train.shards, *corpus.validation.shards):
        end = shard.offset + shard.tokens * np.dtype(shard.dtype).itemsize
        if end > shard.bin_bytes:
            return Damage(
                path=path, got=f"{shard.tokens:,} tokens of {shard.file}", wanted=f"as many as its {shard.bin_bytes:,} bytes hold"
            )
    identity = manifest.content_identity(corpus.train.shards, corpus.validation.shards)
    if identity != corpus.fingerprint:
        return Damage(path=path, got=f"fingerprint {corpus.fingerprint}", wanted=f"{identity}, that of its shards")
    return None


def _index_damage(path: str, raw: bytes, shard: Shard) -> Damage | None:
    try:
        lengths = parse_index(raw, path).document_lengths()
    except (InputError, ValueError, IndexError) as error:
        return Damage(path=path, got=f"no index ({str(error).removeprefix(f'{path}: ')})", wanted=f"one of {shard.documents:,} documents")
    if len(lengths) != shard.documents:
        return Damage(path=path, got=f"{len(lengths):,} documents", wanted=f"{shard.documents:,}")
    if (lengths < 0).any() or int(lengths.sum()) != shard.tokens:
        return Damage(path=path, got=f"documents of {int(lengths.sum()):,} tokens", wanted=f"of {shard.tokens:,}")
    return None
