"""How checkpoints are committed to a directory or an object store, so that each is complete or does not exist.

In a directory a checkpoint is written beside its final path, synced, and renamed. An object store cannot rename: there the manifest, which
is written last, makes objects a checkpoint. In neither can a dead attempt commit. Each attempt writes its token to the fence, and a commit
with another token is refused. A rank that was frozen between that check and the rename finds its files swept away, because an attempt sets
the fence and sweeps before it searches for checkpoints.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count
from pathlib import Path

from manta.data.storage.atomic import sync_directory
from manta.data.storage.local import LocalStore
from manta.data.storage.location import local_path
from manta.data.storage.regular_file import open_regular
from manta.data.storage.remote import RemoteStore
from manta.trainer.checkpoint.backend import CheckpointBackend
from manta.trainer.checkpoint.errors import read_error
from manta.trainer.checkpoint.manifest import MANIFEST, MAX_BYTES

BAD, REPLACED = "bad-", ".replaced-"


class DirectoryBackend(CheckpointBackend):
    """Checkpoints on a disk of this machine, or a shared one."""

    def __init__(self, store: LocalStore) -> None:
        super().__init__(store)
        self.path = store.path

    def bad(self) -> list[str]:
        return sorted(path.name for path in self.path.glob(f"{BAD}*"))

    def manifest(self, name: str) -> bytes:
        return self.store.read(f"{name}/{MANIFEST}", MAX_BYTES)

    def check_readable(self, name: str) -> None:
        try:
            for path in (self.path / name).iterdir():
                open_regular(path).close()
        except PermissionError as error:
            raise read_error(str(error.filename), error) from None
        except OSError:
            return

    def abandon(self, name: str, token: str) -> None:
        shutil.rmtree(self.path / self._uncommitted(name, token), ignore_errors=True)

    def delete(self, name: str) -> None:
        """Renames first, because a half-deleted checkpoint would seem damaged."""
        swept = self.path / f".swept-{name}"
        shutil.rmtree(swept, ignore_errors=True)
        try:
            (self.path / name).rename(swept)
        except FileNotFoundError:
            return
        shutil.rmtree(swept, ignore_errors=True)

    def set_aside(self, name: str) -> None:
        (self.path / name).rename(_unused(self.path / f"{BAD}{name}"))

    def _committed(self) -> Iterable[str]:
        try:
            return [path.name for path in self.path.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise read_error(str(self), error) from None

    def _uncommitted(self, name: str, token: str) -> str:
        return f".{name}.{token}.partial"

    def _sweep(self, token: str) -> None:
        for left in self.path.glob(f"{REPLACED}*"):
            name = left.name.removeprefix(REPLACED)
            left.rename(_unused(self.path / f"{BAD}{name}") if (self.path / name).exists() else self.path / name)
        for left in self.path.glob(".step-*"):  # a rename is immediate and final, a deletion is neither
            swept = left.with_name(f".swept-{token}-{left.name}")
            try:
                left.rename(swept)
            except FileNotFoundError:
                continue
        for left in self.path.glob(".swept-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _publish(self, name: str, token: str, manifest: bytes) -> None:
        partial = self._uncommitted(name, token)
        self.store.write(f"{partial}/{MANIFEST}", manifest)
        self._check_fence(name, token)
        final, replaced = self.path / name, self.path / f"{REPLACED}{name}"
        exists = final.exists()  # rarely: a run resumes from a good checkpoint, and sets a bad one aside
        if exists:
            final.rename(replaced)  # the next sweep moves it back if this process is killed
        try:
            (self.path / partial).rename(final)
        except OSError:
            if exists:
                replaced.rename(final)
            raise
        if exists:
            replaced.rename(_unused(self.path / f"{BAD}{name}"))
        sync_directory(self.path)


def _unused(path: Path) -> Path:
    """Return the path, or the first with a number appended that does not exist."""
    return next(p for p in chain([path], (path.with_name(f"{path.name}.{n}") for n in count(2))) if not p.exists())


class ObjectStoreBackend(CheckpointBackend):
    """Checkpoints in an object store, whose files and manifest are stored under the name and the token of the attempt that wrote them.

    So no attempt overwrites another's objects, however late it writes. If two have saved the same step, that of the attempt in the fence
    counts, else that of the later attempt.
    """

    store: RemoteStore

    def bad(self) -> list[str]:
        return [name for name, _ in self._manifests(f"{BAD}{MANIFEST}")]

    def manifest(self, name: str) -> bytes:
        return self.store.read(f"{name}/{self._token_of(name)}/{MANIFEST}", MAX_BYTES)

    def check_readable(self, name: str) -> None:
        """Do nothing: a store reports a lack of access as such when it lists objects."""

    def write(self, name: str, token: str, file: str, parts: Callable[[], Iterable[memoryview]]) -> str:
        return f"{token}/{super().write(name, token, file, parts)}"

    def abandon(self, name: str, token: str) -> None:
        for path in self._paths(f"{name}/{token}/*"):
            self.store.delete(path)

    def delete(self, name: str) -> None:
        """Deletes the manifests first, so that the remaining files are no longer a checkpoint."""
        for path in sorted(self._paths(f"{name}/*/*"), key=lambda path: not path.endswith(f"/{MANIFEST}")):
            self.store.delete(path)

    def set_aside(self, name: str) -> None:
        folder = f"{name}/{self._token_of(name)}"
        self.store.write(f"{folder}/{BAD}{MANIFEST}", self.store.read(f"{folder}/{MANIFEST}"))
        self.store.delete(f"{folder}/{MANIFEST}")

    def _committed(self) -> Iterable[str]:
        return (name for name, _ in self._manifests(MANIFEST))

    def _uncommitted(self, name: str, token: str) -> str:
        return f"{name}/{token}"

    def _sweep(self, token: str) -> None:
        kept = {*self._manifests(MANIFEST), *self._manifests(f"{BAD}{MANIFEST}")}
        for path in self._paths("step-*/*/*"):
            if _name_and_token(path) not in kept and _name_and_token(path)[1] != token:
                self.store.delete(path)

    def _publish(self, name: str, token: str, manifest: bytes) -> None:
        self._check_fence(name, token)
        self.store.write(f"{name}/{token}/{MANIFEST}", manifest)

    def _manifests(self, file: str) -> dict[tuple[str, str], None]:
        """Return the name and token of each checkpoint with such a manifest."""
        return dict.fromkeys(_name_and_token(path) for path in self._paths(f"step-*/*/{file}"))

    def _token_of(self, name: str) -> str:
        """Return the token of the attempt that committed a checkpoint. Raises FileNotFoundError if none did."""
        tokens = [_name_and_token(path)[1] for path in self._paths(f"{name}/*/{MANIFEST}")]
        if not tokens:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.location(name))
        current = self._fence().token
        return max(tokens, key=lambda token: (token == current, token))

    def _paths(self, pattern: str) -> Iterator[str]:
        """Yield the paths of the objects that match, such as step-00000100/a0001-1f2e3d4c/manifest.json."""
        return ("/".join(file.path.rsplit("/", 3)[1:]) for file in self.store.list(pattern))


def _name_and_token(path: str) -> tuple[str, str]:
    name, token, _ = path.split("/")
    return name, token


def open_backend(location: str | Path) -> CheckpointBackend:
    """Return the checkpoints at a path or URL."""
    path = local_path(str(location))
    return ObjectStoreBackend(RemoteStore(str(location).rstrip("/"))) if path is None else DirectoryBackend(LocalStore(path))
