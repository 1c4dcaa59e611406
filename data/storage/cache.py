"""A node's cache of remote files: each is downloaded once, whatever number of processes asks, and what lies there under its name is whole.

    <directory>/<xxh3>-<size>.bin        a file, named by its content
    <directory>/.<xxh3>-<size>.bin.tmp   one that is being downloaded; it has its full size from the start, so that it counts

Locks are the kernel's, on these files themselves, so that they end with their holder, however it ends: a download holds its temporary
exclusively (others wait for it, then find the file), `held` a file in common with others, and who evicts can have neither. A temporary
that nobody holds is a dead process's, and is removed. The directory's own lock is held by who counts, evicts or renames.
"""

import errno
import fcntl
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader, FileIO
from os.path import samestat
from pathlib import Path, PurePosixPath

import xxhash

from manta.data.errors import InputError
from manta.data.storage.atomic import TEMPORARY
from manta.data.storage.store import open_store

log = logging.getLogger(__name__)

DOWNLOADS = 3  # at a time, of those read ahead
BAD_DOWNLOADS = 3  # in a row: then the object itself is taken to be damaged
PATIENCE = 10.0  # seconds to wait for others to let go of files, where only these, and no downloads, stand against the limit

_NAME = re.compile(r"[0-9a-f]{16}-\d+(\.\w{1,16})?")  # nothing else in the directory is ours to remove
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedFile:
    """An object: its number of bytes, and their hash as manta.data.shards.shard computes it. `name` is that of its local file."""

    url: str
    size: int
    xxh3: str

    @property
    def name(self) -> str:
        suffix = PurePosixPath(self.url).suffix
        name = f"{self.xxh3}-{self.size}"
        return name + suffix if _NAME.fullmatch(name + suffix) else name


class ShardCache:
    """One of these a process (it holds threads); any number of them share a directory. Both directory and limit are of data.cache."""

    def __init__(self, directory: Path, limit: int) -> None:
        """Raises InputError where the directory can not be written."""
        self._directory = directory.expanduser().absolute()
        self._limit = limit
        self._guard = threading.Lock()
        self._wanted: deque[CachedFile] = deque()
        self._workers = 0
        wants = "wants a directory on a local disk that can be written"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._evict(0)  # the limit may have come down, and a process may have died
        except OSError as error:
            raise InputError(f"data.cache.directory: {self._directory}: {error.strerror}; {wants}") from None
        if not os.access(self._directory, os.W_OK):
            raise InputError(f"data.cache.directory: {self._directory}: not writable; {wants}")

    def fetch(self, url: str, *, size: int, xxh3: str, verify: bool = False) -> Path:
        """The local file of an object, downloaded where it is not there. Another process may evict it at any time: see held().

        A file that is there is trusted by its name and size; `verify` reads it whole, and downloads it anew where it is damaged.
        Raises InputError where the object is damaged or larger than the limit, OSError where the store or the disk fails.
        """
        with self.held(url, size=size, xxh3=xxh3, verify=verify) as path:
            return path

    @contextmanager
    def held(self, url: str, *, size: int, xxh3: str, verify: bool = False) -> Generator[Path]:
        """fetch(), and no process evicts the file before this ends. What is open or mapped by then stays readable for ever."""
        file = CachedFile(url=url, size=size, xxh3=xxh3)
        while True:
            with self._held_if_there(file, verify=verify) as there:
                if there:
                    yield self._directory / file.name
                    return
            self._download(file)

    def ahead(self, files: Iterable[CachedFile]) -> None:
        """Fetch these in the background, in this order, as many as the limit holds; what was asked for before and has not begun is dropped.

        Returns at once. What fails is logged, and tried again by fetch().
        """
        wanted: deque[CachedFile] = deque()
        total = 0
        for file in dict.fromkeys(files):
            total += file.size
            if total > self._limit:
                break
            wanted.append(file)
        for file in reversed(wanted):
            with suppress(FileNotFoundError):
                _touch(self._directory / file.name)  # what is there already is to make way for none of the others
        with self._guard:
            self._wanted = wanted
            while self._workers < min(DOWNLOADS, len(wanted)):
                self._workers += 1
                threading.Thread(target=self._work, name="read-ahead", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._guard:
                if not self._wanted:
                    self._workers -= 1
                    return
                file = self._wanted.popleft()
            try:
                self.fetch(file.url, size=file.size, xxh3=file.xxh3)
            except Exception as error:  # noqa: BLE001  whoever needs the file tries again, and gets the error
                log.warning("reading ahead: %s", error)

    @contextmanager
    def _held_if_there(self, file: CachedFile, *, verify: bool) -> Generator[bool]:
        """Whether the file is there and sound, which then holds while this lasts. One that is damaged is removed."""
        path = self._directory / file.name
        with ExitStack() as stack:
            try:
                stream = stack.enter_context(path.open("rb"))
            except FileNotFoundError:
                stream = None
            if stream is not None:
                fcntl.flock(stream, fcntl.LOCK_SH)
            if stream is None or not _is_at(stream, path):
                yield False
            elif problem := _problem(stream, file, verify=verify):
                log.warning("%s: %s; it is downloaded again", path, problem)
                with self._alone():
                    if _is_at(stream, path):
                        path.unlink()
                yield False
            else:
                _touch(path)
                yield True

    def _download(self, file: CachedFile) -> None:
        """Make the file appear, or find that another process or thread did, or gave up."""
        path, temporary = self._directory / file.name, self._directory / f".{file.name}{TEMPORARY}"
        with open(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as stream:  # noqa: PTH123  pathlib truncates
            fcntl.flock(stream, fcntl.LOCK_EX)
            if not _is_at(stream, temporary):
                return
            try:
                if path.exists():
                    temporary.unlink()
                    return
                self._reserve(stream, file)
                _fill(stream, file)
                with self._alone():
                    temporary.replace(path)
            except BaseException as error:
                temporary.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.errno in _FULL:
                    told = f"no room for the {file.size} bytes of {file.url}: free some, or lower data.cache.bytes"
                    raise OSError(error.errno, told, str(path)) from None
                raise

    def _reserve(self, stream: FileIO, file: CachedFile) -> None:
        """Evict until the file fits, and let its temporary count with all of its bytes. Raises InputError where it can not be."""
        if file.size > self._limit:
            raise InputError(f"data.cache.bytes: got {self._limit}, wants at least {file.size} for {file.url}; raise it")
        deadline = time.monotonic() + PATIENCE
        while True:
            with self._alone():
                total, downloads = self._evict(file.size)
                if total + file.size <= self._limit:
                    os.ftruncate(stream.fileno(), file.size)
                    return
            if downloads:
                deadline = time.monotonic() + PATIENCE  # they end, and can be evicted
            if time.monotonic() > deadline:
                wants = f"wants at least {total + file.size} for these and {file.url}"
                raise InputError(f"data.cache.bytes: got {self._limit}, and files in use take {total}; {wants}; raise it")
            time.sleep(0.05)

    def _evict(self, wanted: int) -> tuple[int, int]:
        """Remove dead temporaries, and files, the least recently used first, until `wanted` bytes more fit.

        Returns the bytes that remain, and how many of these belong to downloads under way.
        """
        downloads = total = 0
        files: list[tuple[int, int, Path]] = []
        for path in self._directory.iterdir():
            with suppress(FileNotFoundError):  # a download that fails takes no lock of the directory
                status = path.stat()
                if path.name.startswith(".") and path.name.endswith(TEMPORARY) and _NAME.fullmatch(path.name[1 : -len(TEMPORARY)]):
                    downloads += 0 if _drop(path) else status.st_size
                elif _NAME.fullmatch(path.name):
                    total += status.st_size
                    files.append((status.st_mtime_ns, status.st_size, path))
        total += downloads
        for _, size, path in sorted(files):
            if total + wanted <= self._limit:
                break
            total -= size if _drop(path) else 0
        return total, downloads

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Who counts or removes files does so alone in the directory."""
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _fill(stream: FileIO, file: CachedFile) -> None:
    """The object's bytes, once they are the ones that are wanted."""
    got = ""
    for _ in range(BAD_DOWNLOADS):
        digest, count = xxhash.xxh3_64(), 0
        stream.seek(0)
        for block in open_store(file.url).blocks(file.size):
            _write(stream, block)
            digest.update(block)
            count += len(block)
        if (count, digest.hexdigest()) == (file.size, file.xxh3):
            return
        got = f"{count} bytes of xxh3 {digest.hexdigest()}"
        log.warning("%s: got %s, wants %d of %s", file.url, got, file.size, file.xxh3)
    wants = f"wants {file.size} bytes of {file.xxh3}"
    raise InputError(f"{file.url}: got {got}, {BAD_DOWNLOADS} times; {wants}: the object is damaged, prepare the corpus again")


def _write(stream: FileIO, block: memoryview) -> None:
    while block:
        block = block[stream.write(block) :]


def _problem(stream: BufferedReader, file: CachedFile, *, verify: bool) -> str | None:
    size = os.fstat(stream.fileno()).st_size
    if size != file.size:
        return f"{size} bytes, wants {file.size}"
    if not verify:
        return None
    digest = xxhash.xxh3_64()
    while block := stream.read(1 << 22):
        digest.update(block)
    return None if digest.hexdigest() == file.xxh3 else f"xxh3 {digest.hexdigest()}, wants {file.xxh3}"


def _touch(path: Path) -> None:
    """The least recently used files go first. The kernel's own time would be the same for some milliseconds."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _drop(path: Path) -> bool:
    """Remove a file that nobody holds; whether it is gone."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return True
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if _is_at(stream, path):
            path.unlink()
        return True


def _is_at(stream: FileIO | BufferedReader, path: Path) -> bool:
    """Whether what is open is still what the path names: it may have been removed or renamed while its lock was waited for."""
    try:
        return samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
