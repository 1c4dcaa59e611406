"""Files in object stores, as fsspec's file systems serve them. Nothing is cached."""

import errno
import glob
import io
import re
import secrets
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from manta.data.errors import InputError
from manta.data.storage.location import FileListing, StoredFile, join
from manta.data.storage.regular_file import MAX_READ
from manta.data.storage.remote_requests import http_status, request

BLOCK = 16 << 20  # bytes of one request: what a broken connection costs, and what a download or a stream holds in memory

_HASHES = ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "generation")  # names that stores use
_TIMES = ("LastModified", "last_modified", "mtime", "modified", "created")


class RemoteStore:
    is_local = False

    def __init__(self, url: str) -> None:
        self._url = url

    def location(self, name: str = "") -> str:
        return join(self._url, name) if name else self._url

    def exists(self, name: str = "") -> bool:
        try:
            self._info(name)
        except FileNotFoundError:
            return False
        return True

    def stat(self, name: str = "") -> StoredFile:
        url, info = self.location(name), self._info(name)
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "no such object, only others below it", url)
        if info.get("size") is None:
            raise InputError(f"{url}: expected a store that reports sizes. Download the file, and use its local path.")
        return _stored_file(url, info)

    def find(self) -> FileListing:
        """Over HTTP a directory is a page like any other: a URL that ends in a slash is one, and holds what the page links to."""
        is_page = self._url.startswith(("http://", "https://")) and self._url.endswith("/")
        listed = self.list("**" if is_page else "")
        path = _bare(self._url)
        root = path if is_page or not glob.has_magic(self._url) else re.split(r"[*?[]", path)[0].rpartition("/")[0]
        below = {file.path: _bare(file.path).removeprefix(root) for file in listed}
        hidden = {url for url, rest in below.items() if "/." in rest and "/." not in path.removeprefix(root)}
        files: dict[str, StoredFile | None] = {file.path: file for file in listed if file.path not in hidden}
        return FileListing(files=files, is_directory=root == path and any(below.values()))

    def list(self, pattern: str = "") -> list[StoredFile]:
        """Return the objects that match a pattern below the root, sorted; if omitted, those that the root itself names."""
        url = f"{self._url.rstrip('/')}/{pattern}" if pattern else self._url

        def find(system: Any) -> list[StoredFile]:
            system.invalidate_cache()
            try:
                info = system.info(url)
            except FileNotFoundError:
                info = None
            if info and info["type"] == "file":
                found = {info["name"]: info}
            else:
                found = system.glob(url, detail=True) if glob.has_magic(url) else system.find(url, detail=True)
            files = {name: info for name, info in found.items() if info["type"] == "file" and not name.endswith("/")}
            sized = {name: system.info(name) if info.get("size") is None else info for name, info in files.items()}
            return sorted(_stored_file(system.unstrip_protocol(name), info) for name, info in sized.items())

        try:
            return request(url, find)
        except FileNotFoundError:
            return []

    def read(self, name: str = "", limit: int = MAX_READ) -> bytes:
        """Raises OSError, also if the object has more than `limit` bytes."""
        if (size := self.stat(name).size) > limit:
            raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", self.location(name))
        return b"".join(self.blocks(size, name))

    def blocks(self, size: int, name: str = "") -> Iterator[memoryview]:
        """A broken connection costs one block."""
        url = self.location(name)
        for start in range(0, size, BLOCK):
            block = _read_range(url, start, min(start + BLOCK, size))
            yield memoryview(block)
            if len(block) < min(BLOCK, size - start):
                return

    def open(self, name: str = "", *, size: int | None = None) -> BinaryIO:
        return io.BufferedReader(_Stream(self.location(name), self.stat(name).size if size is None else size), BLOCK)

    def open_arrow(self, name: str = "", *, mapped: bool = False) -> Any:
        import pyarrow as pa

        del mapped

        return pa.PythonFile(self.open(name), mode="r")

    @contextmanager
    def open_ranges(self, name: str = "") -> Generator[Callable[[int, memoryview], int]]:
        url = self.location(name)

        def read_into(start: int, buffer: memoryview) -> int:
            done = 0
            for first in range(0, len(buffer), BLOCK):
                content = _read_range(url, start + first, start + min(first + BLOCK, len(buffer)))
                buffer[first : first + len(content)] = content
                done += len(content)
            return done

        yield read_into

    def write(self, name: str, content: bytes) -> None:
        """Object stores show an object once it is whole; stores with directories (sftp://, hdfs://) may show a part of it before."""
        self._write(name, lambda system, url: system.pipe_file(url, content))

    def write_parts(self, name: str, parts: Callable[[], Iterable[memoryview]]) -> None:
        """Holds a few blocks in memory at most."""

        def write(system: Any, url: str) -> None:
            stream = system.open(url, "wb", block_size=BLOCK)
            try:
                for part in parts():
                    stream.write(part)
            except BaseException:
                with suppress(Exception):  # drop what was uploaded, if the store can; closing the stream would make it an object
                    stream.closed = True
                    stream.discard()
                raise
            stream.close()

        self._write(name, write)

    @contextmanager
    def staging(self) -> Generator[Path]:
        with tempfile.TemporaryDirectory(prefix="manta-prepare-") as folder:
            yield Path(folder)
            for file in sorted(Path(folder).iterdir()):
                self.upload(file, file.name)

    def upload(self, file: Path, name: str) -> None:
        """Holds some 100 MB in memory at most."""
        file.open("rb").close()  # an error of the file itself must not be taken for one of the store
        self._write(name, lambda system, url: system.put_file(str(file), url))

    def delete(self, name: str = "") -> None:
        url = self.location(name)
        with suppress(FileNotFoundError):
            request(url, lambda system: system.rm_file(url))

    def create(self) -> None:
        """Do nothing: an object's directories come with it."""

    def check_writable(self, key: str) -> None:
        name = f"trial-{secrets.token_hex(4)}"
        try:
            self.write(name, b"whether checkpoints can be saved here")
            self.delete(name)
        except (OSError, InputError) as error:
            raise InputError(f"{key}: expected a URL that can be written, got {self._url}: {error}") from None

    def free_bytes(self) -> int | None:
        return None

    def _write(self, name: str, action: Callable[[Any, str], None]) -> None:
        """Object stores have no directories, and fsspec serves them asynchronously. The other stores raise if a directory is missing."""
        url = self.location(name)

        def write(system: Any) -> None:
            if not system.async_impl:
                system.makedirs(url.rpartition("/")[0], exist_ok=True)
            action(system, url)

        request(url, write)

    def _info(self, name: str) -> dict[str, Any]:
        url = self.location(name)

        def info(system: Any) -> dict[str, Any]:
            system.invalidate_cache()
            return system.info(url)

        return request(url, info)


class _Stream(io.RawIOBase):
    """Reads by ranges, so that each range can be retried."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._position = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if position < 0:
            raise ValueError(f"{self._url}: seek: expected 0 or more, got {position}")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._size - self._position)
        if count <= 0:
            return 0
        content = _read_range(self._url, self._position, self._position + count)
        if not content:
            raise OSError(f"{self._url}: expected {self._size} bytes, got {self._position}; it changed while it was read")
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def readall(self) -> bytes:
        """Reads in blocks; io's own method would ask for 8 KB at a time."""
        return b"".join(iter(partial(self.read, BLOCK), b""))


def _read_range(url: str, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of an object, fewer if it ends before."""

    def read(system: Any) -> bytes:
        try:
            return system.cat_file(url, start=start, end=stop)
        except Exception as error:
            if http_status(error) == 416:
                return b""  # it ends before the start
            raise

    content = request(url, read)
    if len(content) > stop - start:
        raise InputError(f"{url}: expected a store that serves ranges, got the whole object. Download the file, and use its local path.")
    return content


def _stored_file(url: str, info: dict[str, Any]) -> StoredFile:
    version: object = next((info[key] for key in (*_HASHES, *_TIMES) if info.get(key)), "")
    text = str(version.timestamp() if isinstance(version, datetime) else version).strip('"')
    return StoredFile(url, int(info.get("size") or 0), text)


def _bare(url: str) -> str:
    """Return a URL without scheme and outer slashes: stores write the same location in several ways."""
    return url.partition("://")[2].strip("/")
