"""Verify every byte of prepared corpora against their manifests: hashes, counts of documents and tokens, and ids.

All problems are reported, not only the first. Each file is read once, by one of a few threads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import NamedTuple

import numpy as np
import xxhash

from manta.data.cores import cores
from manta.data.errors import InputError
from manta.data.sampling.packed_windows import recorded_packing
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.manifest import MANIFEST, Manifest, content_fingerprint
from manta.data.shards.shard import Shard, parse_index
from manta.data.shards.windows import WindowShape
from manta.data.storage.store import open_store

_THREADS = 8

Advance = Callable[[int], None]  # called with the bytes read since the last call


class Damage(NamedTuple):
    path: str
    got: str
    expected: str


class _CorpusFile(NamedTuple):
    """A file of token ids and the shards in it; or the index of one shard; or a packing."""

    path: str
    size: int
    xxh3: str
    vocabulary: int = 0
    shards: tuple[Shard, ...] = ()
    is_index: bool = False

    def damage(self, advance: Advance) -> Damage | None:
        try:
            return self._damage(advance)
        except FileNotFoundError:
            return Damage(self.path, "no such file", f"{self.size:,} bytes")
        except (OSError, InputError) as error:
            return Damage(self.path, f"an error ({error})", f"{self.size:,} bytes")

    def _damage(self, advance: Advance) -> Damage | None:
        store = open_store(self.path)
        if (size := store.stat().size) != self.size:
            return Damage(self.path, f"{size:,} bytes", f"{self.size:,}")
        digest, position, index = xxhash.xxh3_64(), 0, list[bytes]()
        lowest = highest = 0
        for block in store.blocks(size):
            digest.update(block)
            if self.is_index:
                index.append(bytes(block))
            else:
                for ids in self._ids(block, position):
                    lowest, highest = min(lowest, int(ids.min())), max(highest, int(ids.max()))
            position += len(block)
            advance(len(block))
        if digest.hexdigest() != self.xxh3:
            return Damage(self.path, digest.hexdigest(), f"xxh3 {self.xxh3}")
        if self.is_index:
            return self._index_damage(b"".join(index), self.shards[0])
        if self.shards and (lowest < 0 or highest >= self.vocabulary):
            return Damage(self.path, f"id {lowest if lowest < 0 else highest}", f"ids below {self.vocabulary}")
        return None

    def _ids(self, block: memoryview, position: int) -> Iterator[np.ndarray[tuple[int], np.dtype[np.integer]]]:
        """Yield the token ids in a block that starts at this byte of the file. Other bytes, such as a header, are skipped."""
        for shard in self.shards:
            dtype = np.dtype(shard.dtype)
            first = max(shard.offset, position)
            end = min(shard.offset + shard.tokens * dtype.itemsize, position + len(block))
            if first < end:
                yield np.frombuffer(block[first - position : end - position], dtype)

    def _index_damage(self, raw: bytes, shard: Shard) -> Damage | None:
        try:
            lengths = parse_index(raw, self.path).document_lengths()
        except (InputError, ValueError, IndexError) as error:
            problem = str(error).removeprefix(f"{self.path}: ")
            return Damage(self.path, f"no index ({problem})", f"an index of {shard.documents:,} documents")
        if len(lengths) != shard.documents:
            return Damage(self.path, f"{len(lengths):,} documents", f"{shard.documents:,}")
        if (lengths < 0).any() or int(lengths.sum()) != shard.tokens:
            return Damage(self.path, f"documents of {int(lengths.sum()):,} tokens", f"{shard.tokens:,} tokens")
        return None


def verify(corpora: Sequence[tuple[CorpusDirectory, Manifest]], shape: WindowShape, *, advance: Advance) -> list[Damage]:
    """Return all damage, in the order of the files. shape: of the windows whose packing is verified, too."""
    lock = Lock()

    def locked_advance(count: int) -> None:
        with lock:
            advance(count)

    damage = [found for directory, corpus in corpora if (found := _count_damage(directory, corpus))]
    files = [file for directory, corpus in corpora for file in _files(directory, corpus, shape)]
    with ThreadPoolExecutor(min(_THREADS, cores())) as threads:
        damage += [found for found in threads.map(partial(_CorpusFile.damage, advance=locked_advance), files) if found]
    return damage


def corpus_size(corpora: Iterable[tuple[CorpusDirectory, Manifest]], shape: WindowShape) -> tuple[int, int]:
    """Return the number of files that `verify` reads, and their bytes."""
    files = [file for directory, corpus in corpora for file in _files(directory, corpus, shape)]
    return len(files), sum(file.size for file in files)


def _files(directory: CorpusDirectory, corpus: Manifest, shape: WindowShape) -> list[_CorpusFile]:
    """Return a corpus's files. Token files that are read in place may hold several shards."""
    shards_of: dict[str, list[Shard]] = {}
    for shard in (*corpus.train.shards, *corpus.validation.shards):
        shards_of.setdefault(directory.location(shard.file), []).append(shard)
    files: list[_CorpusFile] = []
    for path, shards in shards_of.items():
        size, xxh3 = shards[0].bin_bytes, shards[0].bin_xxh3
        files.append(_CorpusFile(path=path, size=size, xxh3=xxh3, vocabulary=corpus.vocabulary, shards=tuple(shards)))
        for shard in shards:
            index = directory.location(shard.index)
            files.append(_CorpusFile(path=index, size=shard.idx_bytes, xxh3=shard.idx_xxh3, shards=(shard,), is_index=True))
    packed = recorded_packing(directory, shape)
    packings = (*packed.train, *packed.validation) if packed else ()
    return files + [_CorpusFile(path=directory.location(one.file), size=one.bytes, xxh3=one.xxh3) for one in packings]


def _count_damage(directory: CorpusDirectory, corpus: Manifest) -> Damage | None:
    """Return where a manifest contradicts itself."""
    path = directory.location(MANIFEST)
    for name, split in (("train", corpus.train), ("validation", corpus.validation)):
        for key in ("tokens", "documents", "text_bytes"):
            count, total = getattr(split, key), sum(getattr(shard, key) for shard in split.shards)
            if count != total:
                return Damage(path, f"{name}.{key} {count:,}", f"{total:,}, the sum of its shards")
    fingerprint = content_fingerprint(corpus.train.shards, corpus.validation.shards)
    if fingerprint != corpus.fingerprint:
        return Damage(path, f"fingerprint {corpus.fingerprint}", f"{fingerprint}, that of its shards")
    return None
