"""One interface to files on a local disk or in an object store. Corpora and checkpoints are read and written through it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from manta.data.storage.local import LocalStore
from manta.data.storage.location import FileListing, StoredFile, local_path
from manta.data.storage.remote import RemoteStore


class Store(Protocol):
    """Files below a root, which is a directory, a prefix of objects, or one file.

    `name` is a file's path below the root; if omitted, the root itself is meant. Methods that read raise FileNotFoundError if there is no
    such file, InputError if the user has to fix something (no access, an unknown scheme), and OSError if the disk or the store fails.
    """

    @property
    def is_local(self) -> bool:
        """Whether files are on a disk that this machine mounts, so that reading all of them is cheap."""
        ...

    def location(self, name: str = "") -> str:
        """Return a path or URL."""
        ...

    def exists(self, name: str = "") -> bool:
        """Return whether there is such a file or directory."""
        ...

    def stat(self, name: str = "") -> StoredFile: ...

    def find(self) -> FileListing:
        """Return the files that the root names: itself, all that match if it is a glob, or all below it. Hidden files are skipped."""
        ...

    def read(self, name: str = "") -> bytes: ...

    def blocks(self, size: int, name: str = "") -> Iterator[memoryview]:
        """Yield the first `size` bytes of a file, fewer if it is shorter. A block is valid until the next one is asked for."""
        ...

    def open(self, name: str = "", *, size: int | None = None) -> BinaryIO:
        """Return a buffered stream that can seek. If the size is known, an object store is not asked for it."""
        ...

    def open_arrow(self, name: str = "", *, mapped: bool = False) -> Any:
        """Return the same as a pyarrow.NativeFile. mapped: memory-mapped if it is local, so that only what is used is read."""
        ...

    def open_ranges(self, name: str = "") -> AbstractContextManager[Callable[[int, memoryview], int]]:
        """Open a file for reads at any offset.

        The function that is yielded fills a buffer from a byte of the file, and returns how many bytes it read: fewer than the buffer
        holds only if the file ends before.
        """
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a file, which appears whole or not at all, also after a power cut."""
        ...

    def write_parts(self, name: str, parts: Callable[[], Iterable[memoryview]]) -> None:
        """Write a file too large for memory, durable when this returns. `parts` is called again for each retry.

        A local file that a killed process has half written stays under its name.
        """
        ...

    def staging(self) -> AbstractContextManager[Path]:
        """Yield a local directory for new files, which are in the store after the block: the root itself, or a temporary directory."""
        ...

    def delete(self, name: str = "") -> None:
        """Delete a file. A missing one is no error."""
        ...

    def create(self) -> None:
        """Make the root's directory, and delete the temporary files that killed processes left in it. Object stores need neither."""
        ...

    def check_writable(self, key: str) -> None:
        """Raises InputError, which names the config key, unless files can be written below the root. Creates nothing that stays."""
        ...

    def free_bytes(self) -> int | None:
        """Return the bytes available, or None if the store has no limit that it reports."""
        ...


def open_store(location: str | Path) -> Store:
    """Return the store of a path or URL. Nothing is checked yet."""
    path = local_path(str(location))
    return RemoteStore(str(location)) if path is None else LocalStore(path)
