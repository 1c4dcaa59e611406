"""Where a run's checkpoints lie: a directory, or a URL of an object store. Both promise that a checkpoint is there whole, or not at all.

On a disk it is written beside its place, synced, and renamed into it. An object store can not rename; there the manifest, put last, is what
makes objects a checkpoint. Neither lets a dead attempt commit: each attempt leaves its token in `fence`, and who comes to commit and finds
another's is refused. A rank that was frozen between that look and the rename finds its files swept away: whoever sets a fence does that
before it looks for checkpoints.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

from manta.data import remote
from manta.data.durable import TEMPORARY, sync_directory, write_atomically
from manta.data.errors import InputError
from manta.trainer.checkpoint.errors import FencedError
from manta.trainer.checkpoint.manifest import MANIFEST, step_of

log = logging.getLogger(__name__)
FENCE, LATEST, BAD, REPLACED = "fence.json", "latest", "bad-", ".replaced-"
FULL = {errno.ENOSPC, errno.EDQUOT}

Fence = dict[str, Any]
_NO_FENCE: Fence = {"attempt": 0, "token": ""}

Body = Callable[[], Iterator[memoryview]]
"""A file's bytes, in order; asked for again where a store has to be tried again."""


class Storage(Protocol):
    """Checkpoints go by name, step-00000100. A writer's `token` tells its files from those of other attempts."""

    def names(self) -> list[str]:
        """Of all that are committed, newest first. None of them has been looked into."""
        ...

    def bad(self) -> list[str]:
        """Of those that were set aside."""
        ...

    def at(self, name: str) -> str: ...

    def manifest(self, name: str) -> bytes: ...

    def size(self, name: str, file: str) -> int: ...

    def reader(self, name: str, file: str) -> "Reader":
        """Of a committed checkpoint's file. Raises OSError where there is none."""
        ...

    def fence(self, attempt: int, token: str) -> None:
        """From here on none but this token's holder commits. Raises FencedError where a later attempt has been here.

        attempt: 0 is a run that nobody supervises: it has the run's lock, and comes after whoever was here.
        """
        ...

    def write(self, name: str, token: str, file: str, body: Body) -> str:
        """A file of a checkpoint to be, durable once this returns. Gives its name within the checkpoint."""
        ...

    def free(self) -> int | None:
        """Bytes that there is room for; None where nobody knows."""
        ...

    def commit(self, name: str, token: str, manifest: bytes) -> None:
        """Raises FencedError where another attempt has begun."""
        ...

    def abandon(self, name: str, token: str) -> None:
        """Takes back what was written and not committed."""
        ...

    def delete(self, name: str) -> None: ...

    def delete_bad(self, name: str) -> None: ...

    def set_aside(self, name: str) -> None:
        """Takes a bad one out of sight; its bytes stay for whoever wants to look."""
        ...

    def holds(self, token: str) -> bool:
        """Whether nobody else has begun since."""
        ...


class Reader(Protocol):
    def read_into(self, start: int, buffer: memoryview) -> int:
        """Fills the buffer from byte `start`. Gives how many bytes there were; fewer than asked where the file ends."""
        ...

    def close(self) -> None: ...


def storage_of(where: str | Path) -> Storage:
    return Bucket(str(where)) if remote.is_remote(str(where)) else Folder(Path(where))


class Folder:
    """On a disk, of this machine or shared."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def bad(self) -> list[str]:
        return sorted(path.name for path in self.path.glob(f"{BAD}*"))

    def names(self) -> list[str]:
        return sorted((path.name for path in self.path.glob("step-*") if step_of(path.name) is not None), key=_by_step, reverse=True)

    def at(self, name: str) -> str:
        return str(self.path / name)

    def manifest(self, name: str) -> bytes:
        return (self.path / name / MANIFEST).read_bytes()

    def size(self, name: str, file: str) -> int:
        return (self.path / name / file).stat().st_size

    def reader(self, name: str, file: str) -> Reader:
        return _DiskReader(self.path / name / file)

    def fence(self, attempt: int, token: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        told = _next(self.path, self._fence(), attempt, token)
        try:
            write_atomically(self.path / FENCE, told)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._sweep(token)  # it may be what fills the disk
            write_atomically(self.path / FENCE, told)
        self._sweep(token)

    def _sweep(self, token: str) -> None:
        """Takes away what dead attempts have half written, and ends what they have half done."""
        for left in self.path.glob(f"{REPLACED}*"):
            name = left.name.removeprefix(REPLACED)
            left.rename(_free(self.path / f"{BAD}{name}") if (self.path / name).exists() else self.path / name)
        for left in self.path.glob(".step-*"):  # renamed first, which is at once and for all
            swept = left.with_name(f".swept-{token}-{left.name}")
            try:
                left.rename(swept)
            except FileNotFoundError:
                continue
        for left in self.path.glob(".swept-*"):
            shutil.rmtree(left, ignore_errors=True)
        for left in self.path.glob(f".*{TEMPORARY}"):
            left.unlink(missing_ok=True)

    def holds(self, token: str) -> bool:
        return self._fence()["token"] in {token, ""}

    def write(self, name: str, token: str, file: str, body: Body) -> str:
        path = self._partial(name, token) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=0) as stream:
            for part in body():
                _write_all(stream.fileno(), part)
            os.fsync(stream.fileno())
        return file

    def free(self) -> int | None:
        return shutil.disk_usage(next(path for path in (self.path, *self.path.parents) if path.exists())).free

    def commit(self, name: str, token: str, manifest: bytes) -> None:
        partial, final = self._partial(name, token), self.path / name
        write_atomically(partial / MANIFEST, manifest)
        if not self.holds(token):
            raise FencedError(_begun(self.at(name), self._fence()))
        with self._place(name):
            partial.rename(final)
        sync_directory(self.path)
        _tell_latest(self.path / LATEST, name, lambda: write_atomically(self.path / LATEST, f"{name}\n".encode()))

    @contextmanager
    def _place(self, name: str) -> Generator[None]:
        """Has a checkpoint's place free meanwhile; what was there comes back where that fails, also to whoever sweeps after a kill."""
        final, replaced = self.path / name, self.path / f"{REPLACED}{name}"
        if not final.exists():  # it seldom has: who finds a good one goes on from it, and sets a bad one aside
            yield
            return
        final.rename(replaced)
        try:
            yield
        except OSError:
            replaced.rename(final)
            raise
        replaced.rename(_free(self.path / f"{BAD}{name}"))

    def abandon(self, name: str, token: str) -> None:
        shutil.rmtree(self._partial(name, token), ignore_errors=True)

    def delete(self, name: str) -> None:
        """Renamed first: half deleted, it would look damaged."""
        gone = self.path / f".swept-{name}"
        shutil.rmtree(gone, ignore_errors=True)
        try:
            (self.path / name).rename(gone)
        except FileNotFoundError:
            return
        shutil.rmtree(gone, ignore_errors=True)

    def delete_bad(self, name: str) -> None:
        shutil.rmtree(self.path / name)

    def set_aside(self, name: str) -> None:
        (self.path / name).rename(_free(self.path / f"{BAD}{name}"))

    def _partial(self, name: str, token: str) -> Path:
        return self.path / f".{name}.{token}.partial"

    def _fence(self) -> Fence:
        try:
            return _NO_FENCE | json.loads((self.path / FENCE).read_bytes())
        except FileNotFoundError:
            return _NO_FENCE


class _DiskReader:
    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read_into(self, start: int, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer) and (count := os.preadv(self._descriptor, [buffer[done:]], start + done)):
            done += count
        return done

    def close(self) -> None:
        os.close(self._descriptor)


class Bucket:
    """An object store. A checkpoint's files lie below its name and the token of who wrote them."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def bad(self) -> list[str]:
        return [url.split("/")[-2] for url in self._objects(f"step-*/{BAD}{MANIFEST}")]

    def names(self) -> list[str]:
        found = (url.split("/")[-2] for url in self._objects(f"step-*/{MANIFEST}"))
        return sorted((name for name in found if step_of(name) is not None), key=_by_step, reverse=True)

    def at(self, name: str) -> str:
        return remote.join(self.url, name)

    def manifest(self, name: str) -> bytes:
        return remote.read_bytes(remote.join(self.url, name, MANIFEST))

    def size(self, name: str, file: str) -> int:
        return remote.size_of(remote.join(self.url, name, file))

    def reader(self, name: str, file: str) -> Reader:
        return _BucketReader(remote.join(self.url, name, file))

    def fence(self, attempt: int, token: str) -> None:
        remote.write_bytes(remote.join(self.url, FENCE), _next(self.url, self._fence(), attempt, token))
        kept = {url.split("/")[-2] for url in self._objects("step-*/*.json")}  # committed, or set aside
        for url in self._objects("step-*/*/*"):  # by dead attempts
            if url.split("/")[-3] not in kept:
                remote.delete(url)

    def holds(self, token: str) -> bool:
        return self._fence()["token"] in {token, ""}

    def write(self, name: str, token: str, file: str, body: Body) -> str:
        within = f"{token}/{file}"
        remote.write_parts(remote.join(self.url, name, within), body)
        return within

    def free(self) -> int | None:
        return None

    def commit(self, name: str, token: str, manifest: bytes) -> None:
        if not self.holds(token):
            raise FencedError(_begun(self.at(name), self._fence()))
        remote.write_bytes(remote.join(self.url, name, MANIFEST), manifest)
        latest = remote.join(self.url, LATEST)
        _tell_latest(latest, name, lambda: remote.write_bytes(latest, f"{name}\n".encode()))

    def abandon(self, name: str, token: str) -> None:
        for url in self._objects(f"{name}/{token}/*"):
            remote.delete(url)

    def delete(self, name: str) -> None:
        """The manifest first: without, nothing of it counts."""
        remote.delete(remote.join(self.url, name, MANIFEST))
        for url in self._objects(f"{name}/**"):
            remote.delete(url)

    def delete_bad(self, name: str) -> None:
        for url in self._objects(f"{name}/**"):
            remote.delete(url)

    def set_aside(self, name: str) -> None:
        remote.write_bytes(remote.join(self.url, name, f"{BAD}{MANIFEST}"), self.manifest(name))
        remote.delete(remote.join(self.url, name, MANIFEST))

    def _objects(self, pattern: str) -> list[str]:
        try:
            return [file.url for file in remote.listing(remote.join(self.url, pattern))]
        except FileNotFoundError:
            return []

    def _fence(self) -> Fence:
        try:
            return _NO_FENCE | json.loads(remote.read_bytes(remote.join(self.url, FENCE)))
        except FileNotFoundError:
            return _NO_FENCE


class _BucketReader:
    def __init__(self, url: str) -> None:
        self._url = url

    def read_into(self, start: int, buffer: memoryview) -> int:
        content = remote.read_range(self._url, start, start + len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Nothing is held open."""


def _next(where: object, before: Fence, attempt: int, token: str) -> bytes:
    if attempt and before["attempt"] > attempt:
        raise FencedError(f"{where}: attempt {before['attempt']} has begun since; this is attempt {attempt}, and it may save no more")
    return json.dumps({"attempt": max(attempt, before["attempt"]), "token": token}).encode()


def _tell_latest(at: object, name: str, tell: Callable[[], None]) -> None:
    """For people: nothing relies on it, so a failure here does not undo the commit before."""
    try:
        tell()
    except (OSError, InputError) as error:
        log.warning("%s: %s; %s is saved all the same", at, getattr(error, "strerror", None) or error, name)


def _begun(at: str, fence: Fence) -> str:
    return f"{at}: attempt {fence['attempt']} has begun since; this one may save no more"


def _by_step(name: str) -> int:
    return step_of(name) or 0


def _free(path: Path) -> Path:
    """The path, or the first like it that is not taken."""
    return next(p for p in chain([path], (path.with_name(f"{path.name}.{n}") for n in count(2))) if not p.exists())


def _write_all(descriptor: int, part: memoryview) -> None:
    done = 0
    while done < len(part):
        done += os.write(descriptor, part[done:])
