"""The directory of a prepared corpus. If it is a URL, a file is downloaded into the node's cache when it is first read."""

import errno
import os
import stat
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from manta.data.config import CacheConfig
from manta.data.errors import AccessError, DataError, InputError, one_line
from manta.data.shards.shard import DocumentIndex, Shard, parse_index
from manta.data.storage.atomic import write_atomically
from manta.data.storage.cache import FULL, ShardCache
from manta.data.storage.download import CachedFile, hold_in_memory
from manta.data.storage.location import join
from manta.data.storage.open_files import release_maps
from manta.data.storage.regular_file import make_own_directory, read_regular
from manta.data.storage.store import open_store

REMEDY = "Run `manta prepare` again."
_IN_MEMORY = 1 << 30  # bytes of shards that are read into memory, for a cache on a full disk
_LARGEST = 1 << 28  # bytes of a file that is read whole: a manifest, a record, a tokenizer


class CorpusDirectory:
    def __init__(self, root: str, config: CacheConfig) -> None:
        self.root, self.store, self._config = root, open_store(root), config

    def location(self, name: str) -> str:
        """Return a file's path or URL. Shards that are read in place have names that are absolute."""
        return join(self.root, name)

    def read(self, name: str) -> bytes:
        """Return a small file. Raises FileNotFoundError, AccessError, InputError if it is damaged, and DataError if a store fails."""
        location = self.location(name)
        try:
            return read_regular(Path(location), _LARGEST) if self.store.is_local else self.store.read(name)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise InputError(f"{self._problem(location, error)}. {REMEDY}") from None

    def exists(self, name: str) -> bool:
        """Return whether there is such a file. Raises AccessError if this user may not know."""
        try:
            return self.store.exists(name)
        except PermissionError as error:
            raise self._access_error(self.location(name), error) from None

    def local_copy(self, name: str) -> Path:
        """Return the path of a small file on this node's disk."""
        if self.store.is_local:
            return Path(self.location(name))
        content = self.read(name)
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
        """Return a shard's ids, memory-mapped."""
        with self._local_file(self._token_file(shard)) as path:
            return _map(path, dtype=shard.dtype, offset=shard.offset, shape=(shard.tokens,))

    def map_file(self, name: str, *, size: int, xxh3: str) -> NDArray[Any]:
        """Return the bytes of a file, memory-mapped. Raises InputError if they are not those that were written."""
        with self._local_file(CachedFile(url=self.location(name), size=size, xxh3=xxh3)) as path:
            content = _map(path, dtype=np.uint8, shape=(size,))
            _check_hash(content, xxh3, path)
            return content

    def read_index(self, shard: Shard) -> DocumentIndex:
        with self._local_file(CachedFile(url=self.location(shard.index), size=shard.idx_bytes, xxh3=shard.idx_xxh3)) as path:
            content = read_regular(path, shard.idx_bytes)
            _check_hash(content, shard.idx_xxh3, path)
            return parse_index(content, str(path))

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
        """Return what is wrong with a file, if anything. Raises AccessError if this user may not read it."""
        location, digest = self.location(name), xxhash.xxh3_64()
        try:
            if (found := self._size(location)) != size:
                return f"{location}: expected {size} bytes, got {found}"
            for block in open_store(location).blocks(size) if contents else ():
                digest.update(block)
        except OSError as error:
            return self._problem(location, error)
        return f"{location}: its content has changed since it was written" if contents and digest.hexdigest() != xxh3 else None

    def _size(self, location: str) -> int:
        """Return a file's size. An object store is asked for all sizes at once: a corpus has thousands of files."""
        if open_store(location).is_local:
            status = Path(location).stat()
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", location)
            if not os.access(location, os.R_OK, effective_ids=True):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), location)
            return status.st_size
        if not location.startswith(f"{self.root}/"):
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
        if not open_store(file.url).is_local:
            with ExitStack() as stack:
                try:
                    path = stack.enter_context(_cache(self._config).hold(file))
                except OSError as error:
                    if error.errno not in FULL:
                        raise
                    _limit_memory(file.size)
                    path = stack.enter_context(hold_in_memory(file))
                yield path
            return
        try:
            yield Path(file.url)
        except OSError as error:
            raise InputError(f"{self._problem(file.url, error)}. {REMEDY}") from None

    def _problem(self, location: str, error: OSError) -> str:
        """Return what is wrong with a file.

        Raises AccessError if this user may not read it, InputError for a path through a file, and DataError if a store fails.
        """
        if isinstance(error, FileNotFoundError):
            return f"{location}: missing"
        if not open_store(location).is_local:
            raise DataError(one_line(error)) from None
        if isinstance(error, PermissionError):
            raise self._access_error(location, error) from None
        parent = Path(self.root).parent
        if error.errno in {errno.ENOTDIR, errno.ELOOP} and not parent.is_dir():
            raise InputError(f"data.directory: expected a directory, got {parent}: {error.strerror}. Choose another.") from None
        if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
            raise DataError(f"{location}: {error.strerror}. Raise the limits of this process (ulimit -n, ulimit -v).") from None
        return f"{location}: damaged; {error.strerror}"

    def _access_error(self, location: str, error: PermissionError) -> AccessError:
        shared = Path(self.root).parent if location.startswith(f"{self.root}/") else location
        remedy = f"Its owner can share it (chmod -R go+rX {shared}); or set another data.directory."
        return AccessError(f"{location}: expected read access, got {error.strerror}. {remedy}")


_in_memory = 0


def _limit_memory(size: int) -> None:
    """Unmap what was read before once this file would exceed the limit."""
    global _in_memory  # noqa: PLW0603  of the process, as the maps are
    if _in_memory + size > _IN_MEMORY:
        release_maps()
        _in_memory = 0
    _in_memory += size


def _map(path: Path, *, shape: tuple[int], dtype: Any, offset: int = 0) -> NDArray[Any]:
    """Map part of a file, as a plain array, because a memmap takes microseconds to slice."""
    try:
        return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape))
    except ValueError as error:  # it is shorter
        raise OSError(errno.EINVAL, one_line(error), str(path)) from None


def _check_hash(content: Any, xxh3: str, path: Path) -> None:
    if xxhash.xxh3_64_hexdigest(content) != xxh3:
        raise InputError(f"{path}: damaged; its content has changed since it was written. {REMEDY}")


@cache
def _cache(config: CacheConfig) -> ShardCache:
    """Return the process's only cache: it has threads."""
    return ShardCache(config.directory, config.bytes)
