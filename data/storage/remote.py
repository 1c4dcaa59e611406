"""Objects by URL: the one place that knows fsspec, and through it any store (s3://, gs://, abfs://, https://, hf://, …).

Each function asks the store anew, and where a connection breaks or times out, or the store says that it is unwell (5xx, 429), asks again
after fixed waits that double. They raise

| error | where |
|---|---|
| `FileNotFoundError` | there is no such object, or no such bucket |
| `InputError` | a person has to mend it: an unknown scheme, a missing package, no access |
| `OSError` | the last of `TRIES` tries failed as well, or the store said something else |

Credentials are those of the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, … as each store's own library reads them). No message shows
any, and none may stand in a URL. Processes may fork: a child makes connections of its own.
"""

import errno
import io
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from glob import has_magic
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, cast
from urllib.parse import urlsplit

from manta.data.errors import InputError
from manta.data.storage.remote_errors import meaning, status_of, told_of

log = logging.getLogger(__name__)

TRIES = 5
WAIT = 0.2  # seconds before the second try; twice as long before each further one
BLOCK = 16 << 20  # bytes asked for at a time: what a broken connection costs, and what a download or a stream holds in memory

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_OPTIONS: dict[str, dict[str, Any]] = {  # tries are counted here and nowhere below; two parts at a time, each of 50 MB and more
    "s3": {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 1}}, "max_concurrency": 2}
}
_HASHES = ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "generation")  # as each store calls them
_TIMES = ("LastModified", "last_modified", "mtime", "modified", "created")

T = TypeVar("T")


class _Buffer(Protocol):
    def __len__(self) -> int: ...
    def __setitem__(self, place: slice, content: bytes) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class RemoteFile:
    url: str
    size: int
    identity: str
    """An ETag, hash or time, whichever the store has: another one is another content. Empty where it has none."""


def is_remote(path: str) -> bool:
    """Whether it is a URL of a store; a plain path and file:// are not."""
    scheme = _SCHEME.match(path)
    return scheme is not None and scheme[1].lower() not in {"file", "local"}


def join(url: str, *names: str) -> str:
    return "/".join([url.rstrip("/"), *names])


def exists(url: str) -> bool:
    """Whether there is such an object, or objects below it."""
    try:
        _info(url)
    except FileNotFoundError:
        return False
    return True


def size_of(url: str) -> int:
    """Bytes of an object."""
    info = _info(url)
    if info["type"] != "file":
        raise FileNotFoundError(errno.ENOENT, "no such object, but others below it", url)
    if info.get("size") is None:
        raise InputError(f"{url}: its store does not tell its size; wants one that does: download it, and name the file")
    return int(info["size"])


def read_bytes(url: str) -> bytes:
    return b"".join(blocks(url, size_of(url)))


def write_bytes(url: str, content: bytes) -> None:
    """Object stores show it once it is whole; stores with directories (sftp://, hdfs://) may show a part of it before."""

    def write(store: Any) -> None:
        _make_parent(store, url)
        store.pipe_file(url, content)

    _ask(url, write)


def upload(local: Path, url: str) -> None:
    """A file becomes an object; some 100 MB of it are held in memory at most."""
    local.open("rb").close()  # what is wrong with the file itself is told as such

    def put(store: Any) -> None:
        _make_parent(store, url)
        store.put_file(str(local), url)

    _ask(url, put)


def write_parts(url: str, parts: Callable[[], Iterable[memoryview]]) -> None:
    """An object from its bytes in order, asked for anew at each try; a few blocks of them are held in memory at most."""

    def write(store: Any) -> None:
        _make_parent(store, url)
        stream = store.open(url, "wb", block_size=BLOCK)
        try:
            for part in parts():
                stream.write(part)
        except BaseException:
            _give_up(stream)
            raise
        stream.close()

    _ask(url, write)


def _give_up(stream: Any) -> None:
    """What was uploaded so far is let go, where the store can; closed, it would become an object."""
    with suppress(Exception):
        stream.closed = True
        stream.discard()


def delete(url: str) -> None:
    """Whether it was there or not."""

    def remove(store: Any) -> None:
        try:
            store.rm_file(url)
        except FileNotFoundError:
            return

    _ask(url, remove)


def open_read(url: str, *, size: int | None = None) -> BinaryIO:
    """A stream of an object's bytes, buffered, that can seek. Where its size is known already, the store is not asked for it."""
    return io.BufferedReader(_Stream(url, size_of(url) if size is None else size), BLOCK)


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of an object, fewer where it ends before."""
    return b"".join(_range(url, at, min(at + BLOCK, stop)) for at in range(start, stop, BLOCK))


def blocks(url: str, size: int) -> Iterator[bytes]:
    """The bytes of an object that should have so many; fewer come where it has fewer. A broken connection costs one block."""
    for start in range(0, size, BLOCK):
        block = _range(url, start, min(start + BLOCK, size))
        yield block
        if len(block) < min(BLOCK, size - start):
            return


def listing(url: str) -> list[RemoteFile]:
    """The objects that a URL means, sorted: itself, all that match a glob, or all below it. FileNotFoundError where there are none."""

    def look(store: Any) -> list[RemoteFile]:
        store.invalidate_cache()
        try:
            info = store.info(url)
        except FileNotFoundError:
            info = None
        if info and info["type"] == "file":
            found = {info["name"]: info}
        else:
            found = store.glob(url, detail=True) if has_magic(url) else store.find(url, detail=True)
        files = {name: info for name, info in found.items() if info["type"] == "file" and not name.endswith("/")}
        return sorted(_listed(store, name, info) for name, info in files.items())

    files = _ask(url, look)
    if not files:
        raise FileNotFoundError(errno.ENOENT, "no such objects", url)
    return files


class _Stream(io.RawIOBase):
    """Reads by ranges, so that each of them can be asked for again."""

    def __init__(self, url: str, size: int) -> None:
        self._url = url
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if at < 0:
            raise ValueError(f"{self._url}: seek to {at}; wants 0 or more")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(cast("_Buffer", buffer)), self._size - self._at)
        if wanted <= 0:
            return 0
        content = _range(self._url, self._at, self._at + wanted)
        if not content:
            raise OSError(f"{self._url}: ends at byte {self._at}, wants {self._size}; it changed while it was read")
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def readall(self) -> bytes:
        """In blocks; io's own would ask for 8 KB at a time."""
        parts: list[bytes] = []
        while part := self.read(BLOCK):
            parts.append(part)
        return b"".join(parts)


def _range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of an object, fewer where it ends before."""

    def read(store: Any) -> bytes:
        try:
            return store.cat_file(url, start=start, end=stop)
        except Exception as error:
            if status_of(error) == 416:
                return b""  # it ends before the start
            raise

    content = _ask(url, read)
    if len(content) > stop - start:
        raise InputError(f"{url}: its store gives no part of an object; wants one that does: download it, and name the file")
    return content


def _info(url: str) -> dict[str, Any]:
    def ask(store: Any) -> dict[str, Any]:
        store.invalidate_cache()
        return store.info(url)

    return _ask(url, ask)


def _listed(store: Any, name: str, info: dict[str, Any]) -> RemoteFile:
    if info.get("size") is None:
        info = store.info(name)
    known: object = next((info[key] for key in (*_HASHES, *_TIMES) if info.get(key)), "")
    identity = str(known.timestamp() if isinstance(known, datetime) else known).strip('"')
    return RemoteFile(url=store.unstrip_protocol(name), size=int(info.get("size") or 0), identity=identity)


def _make_parent(store: Any, url: str) -> None:
    """Object stores have no directories, and are the ones that fsspec asks asynchronously; to others a missing one is an error."""
    if not store.async_impl:
        store.makedirs(url.rpartition("/")[0], exist_ok=True)


def _ask(url: str, action: Callable[[Any], T]) -> T:
    """What the store answers, in as many tries as it may take."""
    store = _store(url)
    for attempt in range(1, TRIES + 1):
        try:
            return action(store)
        except Exception as error:  # noqa: BLE001  each store's library has errors of its own
            told = told_of(error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error)
            final = meaning(url, error, told)
            if final is None and attempt == TRIES:
                final = OSError(f"{url}: {TRIES} tries failed, the last with {told}")
            if final is not None:
                raise final from None
            wait = WAIT * 2 ** (attempt - 1)
            log.warning("%s: try %d of %d failed with %s; the next in %.1f s", url, attempt, TRIES, told, wait)
            time.sleep(wait)
    raise AssertionError("the last try has returned or raised")


def _store(url: str) -> Any:
    """The URL's file system, of which fsspec keeps one a process; a forked child gets its own."""
    import fsspec  # tenths of a second, with what it draws in

    scheme = url.partition("://")[0].lower()
    if urlsplit(url).password:
        raise InputError(f"{scheme}://…@{urlsplit(url).hostname}: a password stands in the URL; wants none: give it by the environment")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        remedy = "pip install 'manta[s3]'" if scheme in {"s3", "s3a"} else str(error)
        raise InputError(f"{url}: the package for {scheme}:// is not installed; {remedy}") from None
    except ValueError:
        raise InputError(f"{url}: got an unknown scheme {scheme}://; wants one that fsspec knows, s3:// for example") from None
    try:
        store, _ = fsspec.url_to_fs(url, **_OPTIONS.get("s3" if scheme == "s3a" else scheme, {}))
    except (ValueError, TypeError) as error:
        raise InputError(f"{url}: {told_of(error)}; wants a URL, and settings in the environment, with which {scheme}:// opens") from None
    if scheme in {"s3", "s3a"}:
        store.retries = 1
    return store


def _forget_the_parents_loop() -> None:
    """The thread that ran it is not in a forked child. Newer releases of fsspec see to that themselves."""
    if asyn := sys.modules.get("fsspec.asyn"):
        asyn.reset_lock()


os.register_at_fork(after_in_child=_forget_the_parents_loop)
