"""Files on a local disk, or on a shared one that is mounted."""

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from manta.data.errors import InputError
from manta.data.storage.atomic import TEMPORARY, write_atomically
from manta.data.storage.links import boundary
from manta.data.storage.listing import matches, walk
from manta.data.storage.location import FileListing, StoredFile
from manta.data.storage.regular_file import MAX_READ, open_regular, read_regular

BLOCK = 1 << 22  # bytes of a block, a multiple of any token id's
_BUFFER = 1 << 20  # bytes read at once by a stream


class LocalStore:
    """Files below a root, which is a directory, a glob, or one file.

    `name` is a file's path below the root; if omitted, the root itself is meant.
    """

    is_local = True
    """Whether files are on a disk that this machine mounts, so that reading all of them is cheap."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def location(self, name: str = "") -> str:
        """Return a path or URL."""
        return str(self.path / name)

    def exists(self, name: str = "") -> bool:
        """Return whether there is such a file or directory."""
        return (self.path / name).exists()

    def stat(self, name: str = "") -> StoredFile:
        status = (self.path / name).stat()
        return StoredFile(self.location(name), status.st_size, status.st_mtime_ns)

    def find(self) -> FileListing:
        """Return the files that the root names: itself, all that match if it is a glob, or all below it. Hidden files are skipped.

        Raises InputError if a folder among them is a link out of the directory: it is not entered.
        """
        path = self.location()
        if self.path.is_dir():
            return FileListing(files=dict.fromkeys(walk(path)), is_directory=True, boundary=boundary(path))
        if os.path.lexists(path):
            return FileListing(files={path: None}, is_directory=False)
        files, root = matches(path)
        return FileListing(files=dict.fromkeys(files), is_directory=False, boundary=root)

    def read(self, name: str = "", limit: int = MAX_READ) -> bytes:
        """Raises OSError, also if it is not a regular file, or has more than `limit` bytes."""
        return read_regular(self.path / name, limit)

    def blocks(self, size: int, name: str = "") -> Iterator[memoryview]:
        """Yield the first `size` bytes of a file, fewer if it is shorter. A block is valid until the next one is asked for."""
        block = memoryview(bytearray(min(size, BLOCK)))
        with open_regular(self.path / name) as stream:
            while size > 0 and (count := stream.readinto(block[:size])):  # type: ignore[attr-defined]
                yield block[:count]
                size -= count

    def open(self, name: str = "", *, size: int | None = None) -> BinaryIO:
        """Return a buffered stream that can seek. If the size is known, an object store is not asked for it."""
        del size
        return open_regular(self.path / name, _BUFFER)

    def open_arrow(self, name: str = "", *, mapped: bool = False) -> Any:
        """Return the same as a pyarrow.NativeFile. mapped: memory-mapped if it is local, so that only what is used is read."""
        import pyarrow as pa

        return pa.memory_map(self.location(name)) if mapped else pa.OSFile(self.location(name))

    @contextmanager
    def open_ranges(self, name: str = "") -> Generator[Callable[[int, memoryview], int]]:
        """Open a regular file for reads at any offset.

        The function that is yielded fills a buffer from a byte of the file, and returns how many bytes it read: fewer than the buffer
        holds only if the file ends before.
        """
        with open_regular(self.path / name) as file:

            def read_into(start: int, buffer: memoryview) -> int:
                done = 0
                while done < len(buffer) and (count := os.preadv(file.fileno(), [buffer[done:]], start + done)):
                    done += count
                return done

            yield read_into

    def write(self, name: str, content: bytes) -> None:
        """Write a file, which appears whole or not at all, also after a power cut."""
        write_atomically(self.path / name, content)

    def write_parts(self, name: str, parts: Callable[[], Iterable[memoryview]]) -> None:
        """Write a file too large for memory, durable when this returns. `parts` is called again for each retry.

        A local file that a killed process has half written stays under its name.
        """
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
        """Yield a local directory for new files, which are in the store after the block: the root itself, or a temporary directory."""
        yield self.path

    def delete(self, name: str = "") -> None:
        """Delete a file. A missing one is no error."""
        (self.path / name).unlink(missing_ok=True)

    def create(self) -> None:
        """Make the root's directory, and delete the temporary files that killed processes left in it. Object stores need neither."""
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(f".*{TEMPORARY}"):
            leftover.unlink(missing_ok=True)

    def check_writable(self, key: str) -> None:
        """Raises InputError, which names the config key, unless files can be written below the root. Creates nothing that stays."""
        path = self.path.absolute()
        nearest = self._nearest()
        if not nearest.is_dir():
            kind = "a link to nothing" if nearest.is_symlink() and not os.path.exists(nearest) else "a file"  # noqa: PTH110  a loop is no error
            raise InputError(f"{key}: expected a directory, got {path}, and {nearest} is {kind}. Choose another.")
        try:
            tempfile.TemporaryFile(dir=nearest).close()  # root may write anywhere, but not on a read-only or a full disk
        except OSError as error:
            reason = error.strerror if nearest == path else f"{nearest}: {error.strerror}"
            raise InputError(f"{key}: expected a directory that can be written, got {path} ({reason}). Choose another.") from None

    def free_bytes(self) -> int | None:
        """Return the bytes available, or None if the store has no limit that it reports."""
        return shutil.disk_usage(self._nearest()).free

    def _nearest(self) -> Path:
        """Return the root, or the nearest parent that exists."""
        path = self.path.absolute()
        return next(each for each in (path, *path.parents) if os.path.lexists(each))
