"""The directory of a prepared corpus. If it is a URL, a file is downloaded into the node's cache when it is first read."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from manta.data.config import CacheConfig
from manta.data.errors import InputError
from manta.data.shards.shard import DocumentIndex, Shard, parse_index
from manta.data.storage.atomic import write_atomically
from manta.data.storage.cache import CachedFile, ShardCache
from manta.data.storage.location import join
from manta.data.storage.regular_file import make_own_directory
from manta.data.storage.store import open_store


class CorpusDirectory:
    def __init__(self, root: str, config: CacheConfig) -> None:
        self.root, self.store, self._config = root, open_store(root), config

    def location(self, name: str) -> str:
        """Return a file's path or URL. Shards that are read in place have names that are absolute."""
        return join(self.root, name)

    def local_copy(self, name: str) -> Path:
        """Return the path of a small file on this node's disk."""
        if self.store.is_local:
            return Path(self.location(name))
        content = self.store.read(name)
        folder = self._config.directory.expanduser() / "small"
        try:
            make_own_directory(folder)
        except OSError as error:
            expected = "a directory in which this user can write"
            raise InputError(f"data.cache.directory: expected {expected}, got {folder} ({error.strerror}). Choose another.") from None
        path = folder / f"{xxhash.xxh3_128_hexdigest(content)}-{name}"
        if not path.exists():
            write_atomically(path, content)
        return path

    def tokens(self, shard: Shard) -> NDArray[Any]:
        """Return a shard's ids, memory-mapped; as a plain array, because a memmap takes microseconds to slice."""
        with self._local_file(self._token_file(shard)) as path:
            return np.asarray(np.memmap(path, dtype=shard.dtype, mode="r", offset=shard.offset, shape=(shard.tokens,)))

    def map_file(self, name: str, *, size: int, xxh3: str) -> NDArray[Any]:
        """Return the bytes of a file, memory-mapped."""
        with self._local_file(CachedFile(url=self.location(name), size=size, xxh3=xxh3)) as path:
            return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))

    def read_index(self, shard: Shard) -> DocumentIndex:
        with self._local_file(CachedFile(url=self.location(shard.index), size=shard.idx_bytes, xxh3=shard.idx_xxh3)) as path:
            return parse_index(path.read_bytes(), str(path))

    def prefetch(self, shards: Iterable[Shard]) -> None:
        """Download the shards that are read next, in this order, in the background. Does nothing for local ones."""
        files = [self._token_file(shard) for shard in shards if self.cached_bytes(shard)]
        if files:
            _cache(self._config).prefetch(files)

    def cached_bytes(self, shard: Shard) -> int:
        """Return the bytes that a shard takes in the cache: 0 if it is local."""
        return 0 if open_store(self.location(shard.file)).is_local else shard.bin_bytes

    def shard_problem(self, shard: Shard, *, contents: bool) -> str | None:
        """Return what is wrong with a shard's files, if anything. contents: check their hashes, not their sizes alone."""
        problem = self.file_problem(shard.file, shard.bin_bytes, shard.bin_xxh3, contents=contents)
        return problem or self.file_problem(shard.index, shard.idx_bytes, shard.idx_xxh3, contents=contents)

    def file_problem(self, name: str, size: int, xxh3: str, *, contents: bool) -> str | None:
        location = self.location(name)
        try:
            found = self._size(location)
        except FileNotFoundError:
            return f"{location}: missing"
        if found != size:
            return f"{location}: expected {size} bytes, got {found}"
        if contents:
            digest = xxhash.xxh3_64()
            for block in open_store(location).blocks(size):
                digest.update(block)
            if digest.hexdigest() != xxh3:
                return f"{location}: its content has changed since it was written"
        return None

    def _size(self, location: str) -> int:
        """Return a file's size. An object store is asked for all sizes at once: a corpus has thousands of files."""
        if self.store.is_local or not location.startswith(f"{self.root}/"):
            return open_store(location).stat().size
        if location not in self._remote_sizes:
            raise FileNotFoundError(location)
        return self._remote_sizes[location]

    @cached_property
    def _remote_sizes(self) -> dict[str, int]:
        return {url: file.size for url, file in self.store.find().files.items() if file}

    def _token_file(self, shard: Shard) -> CachedFile:
        return CachedFile(url=self.location(shard.file), size=shard.bin_bytes, xxh3=shard.bin_xxh3)

    @contextmanager
    def _local_file(self, file: CachedFile) -> Generator[Path]:
        """Yield the path of a file on this node, which is not evicted before this ends."""
        if open_store(file.url).is_local:
            yield Path(file.url)
            return
        with _cache(self._config).hold(file) as path:
            yield path


@cache
def _cache(config: CacheConfig) -> ShardCache:
    """Return the process's only cache: it has threads."""
    return ShardCache(config.directory, config.bytes)
