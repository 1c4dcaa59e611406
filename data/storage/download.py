"""Download a remote file, until its size and hash are correct."""

import logging
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import xxhash

from manta.data.errors import InputError
from manta.data.storage.store import open_store

log = logging.getLogger(__name__)

BAD_DOWNLOADS = 3  # in a row: then the object itself is considered damaged

CACHED_NAME = re.compile(r"[0-9a-f]{16}-\d+(\.\w{1,16})?")  # other files in the directory are not the cache's to delete


class CachedFile(NamedTuple):
    """A remote file, with its size and hash."""

    url: str
    size: int
    xxh3: str

    @property
    def name(self) -> str:
        """Its name in the cache."""
        suffix = PurePosixPath(self.url).suffix
        name = f"{self.xxh3}-{self.size}"
        return name + suffix if CACHED_NAME.fullmatch(name + suffix) else name


@contextmanager
def hold_in_memory(file: CachedFile) -> Generator[Path]:
    """Download a file into memory and yield its path, for a disk without room. It is freed as soon as nothing maps it."""
    descriptor = os.memfd_create(file.name)
    try:
        with FileIO(descriptor, "r+b", closefd=False) as stream:
            download(stream, file)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def download(stream: FileIO, file: CachedFile) -> None:
    """Write the object's bytes, until size and hash are correct."""
    got = ""
    for _ in range(BAD_DOWNLOADS):
        digest, count = xxhash.xxh3_64(), 0
        stream.seek(0)
        for block in open_store(file.url).blocks(file.size):
            rest = block
            while rest:
                rest = rest[stream.write(rest) :]
            digest.update(block)
            count += len(block)
        if (count, digest.hexdigest()) == (file.size, file.xxh3):
            return
        got = f"{count} bytes of xxh3 {digest.hexdigest()}"
        log.warning("%s: expected %d bytes of xxh3 %s, got %s", file.url, file.size, file.xxh3, got)
    expected = f"expected {file.size} bytes of xxh3 {file.xxh3}"
    raise InputError(f"{file.url}: {expected}, got {got}, {BAD_DOWNLOADS} times. Prepare the corpus again: the object is damaged.")
