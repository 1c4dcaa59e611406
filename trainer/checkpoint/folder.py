"""Checkpoints on a disk, of this machine or shared."""

import errno
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

from manta.data.storage.atomic import TEMPORARY, sync_directory, write_atomically
from manta.trainer.checkpoint.fence import FENCE, Fence
from manta.trainer.checkpoint.manifest import MANIFEST
from manta.trainer.checkpoint.storage import BAD, LATEST, Body, Reader, newest_first, tell_latest

REPLACED = ".replaced-"
FULL = {errno.ENOSPC, errno.EDQUOT}


class Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def bad(self) -> list[str]:
        return sorted(path.name for path in self.path.glob(f"{BAD}*"))

    def names(self) -> list[str]:
        return newest_first(path.name for path in self.path.glob("step-*"))

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
        told = self._fence().next(attempt, token, self.path).to_bytes()
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
        return self._fence().is_held_by(token)

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
        self._fence().refuse(token, self.at(name))
        with self._place(name):
            partial.rename(final)
        sync_directory(self.path)
        tell_latest(self.path / LATEST, name, lambda: write_atomically(self.path / LATEST, f"{name}\n".encode()))

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

    def set_aside(self, name: str) -> None:
        (self.path / name).rename(_free(self.path / f"{BAD}{name}"))

    def _partial(self, name: str, token: str) -> Path:
        return self.path / f".{name}.{token}.partial"

    def _fence(self) -> Fence:
        return Fence.read((self.path / FENCE).read_bytes, self.path)


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


def _free(path: Path) -> Path:
    """The path, or the first like it that is not taken."""
    return next(p for p in chain([path], (path.with_name(f"{path.name}.{n}") for n in count(2))) if not p.exists())


def _write_all(descriptor: int, part: memoryview) -> None:
    done = 0
    while done < len(part):
        done += os.write(descriptor, part[done:])
