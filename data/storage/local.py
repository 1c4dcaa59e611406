"""Files on a local disk, or on a shared one that is mounted."""

import glob
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from manta.data.errors import InputError
from manta.data.storage.atomic import TEMPORARY, write_atomically
from manta.data.storage.location import FileListing, StoredFile

BLOCK = 1 << 22  # bytes of a block, a multiple of any token id's
_BUFFER = 1 << 20  # bytes read at once by a stream
_NOT_A_CORPUS = {"site-packages", "__pycache__"}


class LocalStore:
    is_local = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def location(self, name: str = "") -> str:
        return str(self.path / name)

    def exists(self, name: str = "") -> bool:
        return (self.path / name).exists()

    def stat(self, name: str = "") -> StoredFile:
        status = (self.path / name).stat()
        return StoredFile(self.location(name), status.st_size, status.st_mtime_ns)

    def find(self) -> FileListing:
        if self.path.is_dir():
            return FileListing(files=dict.fromkeys(walk(self.location())), is_directory=True)
        paths = [self.location()] if self.path.is_file() else _matches(self.location())
        return FileListing(files=dict.fromkeys(paths), is_directory=False)

    def read(self, name: str = "") -> bytes:
        return (self.path / name).read_bytes()

    def blocks(self, size: int, name: str = "") -> Iterator[memoryview]:
        block = memoryview(bytearray(min(size, BLOCK)))
        with (self.path / name).open("rb") as stream:
            while size > 0 and (count := stream.readinto(block[:size])):
                yield block[:count]
                size -= count

    def open(self, name: str = "", *, size: int | None = None) -> BinaryIO:
        del size
        return (self.path / name).open("rb", _BUFFER)

    def open_arrow(self, name: str = "", *, mapped: bool = False) -> Any:
        import pyarrow as pa

        return pa.memory_map(self.location(name)) if mapped else pa.OSFile(self.location(name))

    @contextmanager
    def open_ranges(self, name: str = "") -> Generator[Callable[[int, memoryview], int]]:
        descriptor = os.open(self.path / name, os.O_RDONLY)

        def read_into(start: int, buffer: memoryview) -> int:
            done = 0
            while done < len(buffer) and (count := os.preadv(descriptor, [buffer[done:]], start + done)):
                done += count
            return done

        try:
            yield read_into
        finally:
            os.close(descriptor)

    def write(self, name: str, content: bytes) -> None:
        write_atomically(self.path / name, content)

    def write_parts(self, name: str, parts: Callable[[], Iterable[memoryview]]) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=0) as stream:
            for part in parts():
                done = 0
                while done < len(part):
                    done += os.write(stream.fileno(), part[done:])
            os.fsync(stream.fileno())

    @contextmanager
    def staging(self) -> Generator[Path]:
        yield self.path

    def delete(self, name: str = "") -> None:
        (self.path / name).unlink(missing_ok=True)

    def create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(f".*{TEMPORARY}"):
            leftover.unlink(missing_ok=True)

    def check_writable(self, key: str) -> None:
        path = self.path.absolute()
        nearest = self._nearest()
        if not nearest.is_dir():
            raise InputError(f"{key}: expected a directory, got {path}, and {nearest} is a file. Choose another.")
        if not os.access(nearest, os.W_OK):
            raise InputError(f"{key}: expected a directory that can be written, got {path}. Choose another, or make {nearest} writable.")

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(self._nearest()).free

    def _nearest(self) -> Path:
        """Return the root, or the nearest parent that exists."""
        path = self.path.absolute()
        return next(each for each in (path, *path.parents) if each.exists())


def walk(directory: str) -> Iterator[str]:
    """Yield every file below, sorted, without hidden, installed and compiled ones."""
    seen: set[tuple[int, int]] = set()  # a link may point to a parent
    for folder, children, names in os.walk(directory, onerror=_raise, followlinks=True):
        status = Path(folder).stat()
        inode = (status.st_dev, status.st_ino)
        if inode in seen:
            children[:] = []
            continue
        seen.add(inode)
        children[:] = sorted(child for child in children if child not in _NOT_A_CORPUS and not child.startswith("."))
        yield from (str(Path(folder, name)) for name in sorted(names) if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _matches(pattern: str) -> list[str]:
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207  Path.glob takes no absolute pattern
    return sorted(path for path in found if Path(path).is_file())
