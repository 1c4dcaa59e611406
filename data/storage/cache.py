"""A node's cache of remote files: each is downloaded once, however many processes ask, and every file in it is complete.

    <directory>/<xxh3>-<size>.bin        a file, named after its content
    <directory>/.<xxh3>-<size>.bin.tmp   a download; it has its full size from the start, so that it counts towards the limit

Locks are the kernel's, on these files themselves, so they end with their process. A download locks its temporary file exclusively: other
processes wait for it, then find the file. `hold` locks a file shared, and eviction needs an exclusive lock of either. A temporary file
without a lock belongs to a dead process, and is deleted. The directory's own lock is held to count, evict or rename files.
"""

import errno
import fcntl
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from itertools import accumulate
from os.path import samestat
from pathlib import Path
from typing import BinaryIO

from manta.data.errors import InputError
from manta.data.storage.atomic import TEMPORARY
from manta.data.storage.download import CACHED_NAME, CachedFile, download
from manta.data.storage.regular_file import open_own, open_own_to_write

log = logging.getLogger(__name__)

DOWNLOADS = 3  # prefetched at a time
PATIENCE = 10.0  # seconds to wait for other processes to release files, if only these, and no downloads, keep the cache full

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class ShardCache:
    """One per process, because it has threads. Processes share the directory, with the same limit in bytes."""

    def __init__(self, directory: Path, limit: int) -> None:
        """Raises InputError if the directory cannot be written."""
        self._directory = directory.expanduser().absolute()
        self._limit = limit
        self._queue_lock = threading.Lock()
        self._queue: deque[CachedFile] = deque()
        self._workers = 0
        self._reported_full = False
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                self._evict(0)  # the limit may be lower than before, and a process may have died
            problem = None if os.access(self._directory, os.W_OK) else "not writable"
        except OSError as error:
            problem = error.strerror
        if problem:
            expected = "expected a directory on a local disk that can be written"
            raise InputError(f"data.cache.directory: {expected}, got {self._directory} ({problem}). Choose another.")

    @contextmanager
    def hold(self, file: CachedFile) -> Generator[Path]:
        """Yield the local path of a file, which is downloaded if necessary.

        No process evicts it inside the block. What is opened or mapped there stays readable afterwards. A file in the cache is trusted by
        its name and size, so it must be this user's. Raises InputError if it is not, or if the object is damaged or larger than the limit,
        OSError if the store or the disk fails.
        """
        while True:
            with self._hold_if_present(file) as is_present:
                if is_present:
                    yield self._directory / file.name
                    return
            self._download(file)

    def prefetch(self, files: Iterable[CachedFile]) -> None:
        """Download these files in the background, in this order, as far as the limit allows. Replaces files that are still queued.

        Returns at once. Errors are logged, and raised again by hold().
        """
        distinct = list(dict.fromkeys(files))
        totals = accumulate(file.size for file in distinct)
        queue = deque(file for file, total in zip(distinct, totals, strict=True) if total <= self._limit)
        for file in reversed(queue):
            _touch(self._directory / file.name)  # so that none of these is evicted for another
        with self._queue_lock:
            self._queue = queue
            while self._workers < min(DOWNLOADS, len(queue)):
                self._workers += 1
                threading.Thread(target=self._work, name="prefetch", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._queue_lock:
                if not self._queue:
                    self._workers -= 1
                    return
                file = self._queue.popleft()
            try:
                with self.hold(file):
                    pass
            except Exception as error:  # noqa: BLE001  raised again when the file is needed
                if not (isinstance(error, OSError) and error.errno in FULL):  # which is reported once
                    log.warning("prefetch: %s", error)

    @contextmanager
    def _hold_if_present(self, file: CachedFile) -> Generator[bool]:
        """Yield whether the file is present, and if so, hold it. A file of another size is deleted."""
        path = self._directory / file.name
        with ExitStack() as stack:
            try:
                stream = stack.enter_context(open_own(path))
            except FileNotFoundError:
                stream = None
            except PermissionError as error:
                raise _not_own(path, error) from None
            if stream is not None:
                fcntl.flock(stream, fcntl.LOCK_SH)
            if stream is None or not _is_at(stream, path):
                yield False
            elif (size := os.fstat(stream.fileno()).st_size) != file.size:
                log.warning("%s: expected %d bytes, got %d; it is downloaded again", path, file.size, size)
                with self._locked():
                    if _is_at(stream, path):
                        path.unlink()
                yield False
            else:
                _touch(path)
                yield True

    def _download(self, file: CachedFile) -> None:
        """Download the file, or wait until another process or thread has done so, or has failed."""
        path, temporary = self._directory / file.name, self._directory / f".{file.name}{TEMPORARY}"
        try:
            opened = open_own_to_write(temporary)
        except PermissionError as error:
            raise _not_own(temporary, error) from None
        with opened as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if not _is_at(stream, temporary):
                return
            try:
                if path.exists():
                    temporary.unlink()
                    return
                self._reserve(stream, file)
                while not self._fill(stream, file):
                    continue
                with self._locked():
                    temporary.replace(path)
            except BaseException as error:
                temporary.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.errno in FULL:
                    message = f"no space for the {file.size} bytes of {file.url}. Free some, or lower data.cache.bytes."
                    raise OSError(error.errno, message, str(path)) from None
                raise

    def _reserve(self, stream: FileIO, file: CachedFile) -> None:
        """Evict files until this one fits, and extend its temporary file to its size. Raises InputError if it cannot fit."""
        if file.size > self._limit:
            raise InputError(f"data.cache.bytes: expected at least {file.size} for {file.url}, got {self._limit}. Raise it.")
        deadline = time.monotonic() + PATIENCE
        while True:
            with self._locked():
                total, downloads = self._evict(file.size)
                if total + file.size <= self._limit:
                    os.ftruncate(stream.fileno(), file.size)
                    return
            if downloads:
                deadline = time.monotonic() + PATIENCE  # they will end, and can be evicted
            if time.monotonic() > deadline:
                expected = f"expected at least {total + file.size}: {total} for files in use, the rest for {file.url}"
                raise InputError(f"data.cache.bytes: {expected}; got {self._limit}. Raise it.")
            time.sleep(0.05)

    def _fill(self, stream: FileIO, file: CachedFile) -> bool:
        """Write a file. If the disk is full below the limit, evict as many bytes as it has, and return False to try again.

        Raises OSError if there is nothing to evict.
        """
        try:
            download(stream, file)
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not self._reported_full:
                self._reported_full = True
                problem = "%s: %s: less than data.cache.bytes fit. Older shards are evicted; without any, shards are read into memory."
                log.warning(problem, self._directory, error.strerror)
            with self._locked():
                before, _ = self._evict(0)
                if self._evict(0, before - file.size)[0] == before:
                    raise
            return False
        return True

    def _evict(self, needed: int, limit: int | None = None) -> tuple[int, int]:
        """Delete dead temporary files, and then the least recently used files, until `needed` more bytes fit into the limit.

        Returns the bytes that remain, and how many of these belong to downloads in progress.
        """
        downloads = total = 0
        files: list[tuple[int, int, Path]] = []
        for path in self._directory.iterdir():
            with suppress(FileNotFoundError):  # a download that fails does not lock the directory
                status = path.stat()
                if path.name.startswith(".") and path.name.endswith(TEMPORARY) and CACHED_NAME.fullmatch(path.name[1 : -len(TEMPORARY)]):
                    downloads += 0 if _delete_unlocked(path) else status.st_size
                elif CACHED_NAME.fullmatch(path.name):
                    total += status.st_size
                    files.append((status.st_mtime_ns, status.st_size, path))
        total += downloads
        for _, size, path in sorted(files):
            if total + needed <= (self._limit if limit is None else limit):
                break
            total -= size if _delete_unlocked(path) else 0
        return total, downloads

    @contextmanager
    def _locked(self) -> Generator[None]:
        """Hold the directory's lock."""
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _not_own(path: Path, error: PermissionError) -> InputError:
    """Nothing that another user made is trusted: a file is not hashed again when it is read."""
    return InputError(f"data.cache.directory: expected files of this user, got {path} ({error.strerror}). Choose another directory.")


def _touch(path: Path) -> None:
    """Mark a file as just used. The kernel's own time would be the same for some milliseconds."""
    now = time.time_ns()
    with suppress(OSError):  # on a disk that has become read-only, nothing is evicted either
        os.utime(path, ns=(now, now))


def _delete_unlocked(path: Path) -> bool:
    """Delete a file unless a process holds it or another user made it. Return whether it is gone."""
    try:
        stream = open_own(path)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if _is_at(stream, path):
            path.unlink()
        return True


def _is_at(stream: BinaryIO | FileIO, path: Path) -> bool:
    """Return whether the open file still has this path: it may have been deleted or renamed while its lock was waited for."""
    try:
        return samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
