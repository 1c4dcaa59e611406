"""Where a prepared corpus lies: a directory, or a URL whose files come into the node's cache when they are read."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from manta.data.config import CacheConfig
from manta.data.shards.shard import Index, Shard, map_tokens, read_index
from manta.data.storage.atomic import write_atomically
from manta.data.storage.cache import CachedFile, ShardCache
from manta.data.storage.location import join
from manta.data.storage.store import open_store


class Home:
    """A folder of files with names."""

    def __init__(self, root: str, config: CacheConfig) -> None:
        self.root, self.store = root, open_store(root)
        self._config = config
        self._listed: dict[str, int] | None = None

    def at(self, name: str) -> str:
        """A file's path or URL; one that is whole already stays as it is."""
        return join(self.root, name)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError where it is missing."""
        return self.store.read(name)

    def write(self, name: str, content: bytes) -> None:
        """There whole or not at all."""
        self.store.write(name, content)

    def delete(self, name: str) -> None:
        self.store.delete(name)

    def copy(self, name: str) -> Path:
        """A small file on this node's disk."""
        if self.store.is_local:
            return Path(self.at(name))
        content = self.read(name)
        folder = self._config.directory.expanduser() / "small"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{xxhash.xxh3_128_hexdigest(content)}-{name}"
        if not path.exists():
            write_atomically(path, content)
        return path

    def tokens(self, shard: Shard) -> NDArray[Any]:
        """A shard's ids, mapped; a remote one is fetched, and its hash verified."""
        with self._file(self._tokens_of(shard)) as path:
            return map_tokens(path, shard)

    def mapped(self, name: str, *, size: int, xxh3: str) -> NDArray[Any]:
        """The bytes of any file of which size and hash are known."""
        with self._file(CachedFile(url=self.at(name), size=size, xxh3=xxh3)) as path:
            return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))

    def index(self, shard: Shard) -> Index:
        with self._file(CachedFile(url=self.at(shard.index), size=shard.idx_bytes, xxh3=shard.idx_xxh3)) as path:
            return read_index(path)

    def ahead(self, shards: Iterable[Shard]) -> None:
        """These will be asked for next, in this order: fetched in the background, where they are remote."""
        files = [file for shard in shards if not open_store((file := self._tokens_of(shard)).url).is_local]
        if files:
            _cache(self._config).ahead(files)

    def remote_bytes(self, shard: Shard) -> int:
        """What it takes of the cache, once read."""
        return 0 if open_store(self.at(shard.file)).is_local else shard.bin_bytes

    def problem(self, shard: Shard, *, contents: bool) -> str | None:
        """What is wrong with a shard's files, if anything: there and of their size, and where asked, their hashes."""
        return self.file_problem(shard.file, shard.bin_bytes, shard.bin_xxh3, contents=contents) or self.file_problem(
            shard.index, shard.idx_bytes, shard.idx_xxh3, contents=contents
        )

    def file_problem(self, name: str, size: int, digest: str, *, contents: bool) -> str | None:
        """What is wrong with one file, if anything."""
        at = self.at(name)
        try:
            got = self._size(at)
        except FileNotFoundError:
            return f"{at}: missing"
        if got != size:
            return f"{at}: {got} bytes; wants {size}"
        if contents and _xxh3(at, size) != digest:
            return f"{at}: its content has changed since it was written"
        return None

    def _size(self, at: str) -> int:
        """Of a bucket's files all are asked for at once: a corpus has thousands."""
        if self.store.is_local or not at.startswith(f"{self.root}/"):
            return open_store(at).stat().size
        if self._listed is None:
            self._listed = {path: file.size for path, file in self.store.find().files.items() if file}
        if at not in self._listed:
            raise FileNotFoundError(at)
        return self._listed[at]

    def _tokens_of(self, shard: Shard) -> CachedFile:
        return CachedFile(url=self.at(shard.file), size=shard.bin_bytes, xxh3=shard.bin_xxh3)

    @contextmanager
    def _file(self, file: CachedFile) -> Generator[Path]:
        """Nobody removes it before it is opened."""
        if open_store(file.url).is_local:
            yield Path(file.url)
            return
        with _cache(self._config).held(file.url, size=file.size, xxh3=file.xxh3) as path:
            yield path


@cache
def _cache(config: CacheConfig) -> ShardCache:
    """One a process: it has threads."""
    return ShardCache(config.directory, config.bytes)


def _xxh3(at: str, size: int) -> str:
    digest = xxhash.xxh3_64()
    for block in open_store(at).blocks(size):
        digest.update(block)
    return digest.hexdigest()
