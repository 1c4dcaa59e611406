"""Checkpoints in an object store. One's files, and its manifest, lie below its name and the token of who wrote them.

So no attempt writes where another does, however late it comes. Where two have saved the same step, that of the attempt in the fence counts,
else that of the later one.
"""

import errno
import os

from manta.data.storage import remote
from manta.trainer.checkpoint.fence import FENCE, Fence
from manta.trainer.checkpoint.manifest import MANIFEST
from manta.trainer.checkpoint.storage import BAD, LATEST, Body, Reader, newest_first, tell_latest


class Bucket:
    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def bad(self) -> list[str]:
        return [name for name, _ in self._manifests(f"{BAD}{MANIFEST}")]

    def names(self) -> list[str]:
        return newest_first(name for name, _ in self._manifests(MANIFEST))

    def at(self, name: str) -> str:
        return remote.join(self.url, name)

    def manifest(self, name: str) -> bytes:
        return remote.read_bytes(remote.join(self.url, name, self._token_of(name), MANIFEST))

    def size(self, name: str, file: str) -> int:
        return remote.size_of(remote.join(self.url, name, file))

    def reader(self, name: str, file: str) -> Reader:
        return _BucketReader(remote.join(self.url, name, file))

    def fence(self, attempt: int, token: str) -> None:
        remote.write_bytes(remote.join(self.url, FENCE), self._fence().next(attempt, token, self.url).to_bytes())
        kept = {*self._manifests(MANIFEST), *self._manifests(f"{BAD}{MANIFEST}")}
        for url in self._objects("step-*/*/*"):  # by dead attempts
            if _place(url) not in kept:
                remote.delete(url)

    def holds(self, token: str) -> bool:
        return self._fence().is_held_by(token)

    def write(self, name: str, token: str, file: str, body: Body) -> str:
        within = f"{token}/{file}"
        remote.write_parts(remote.join(self.url, name, within), body)
        return within

    def free(self) -> int | None:
        return None

    def commit(self, name: str, token: str, manifest: bytes) -> None:
        self._fence().refuse(token, self.at(name))
        remote.write_bytes(remote.join(self.url, name, token, MANIFEST), manifest)
        latest = remote.join(self.url, LATEST)
        tell_latest(latest, name, lambda: remote.write_bytes(latest, f"{name}\n".encode()))

    def abandon(self, name: str, token: str) -> None:
        for url in self._objects(f"{name}/{token}/*"):
            remote.delete(url)

    def delete(self, name: str) -> None:
        """The manifests first: without, nothing of it counts."""
        for url in sorted(self._objects(f"{name}/*/*"), key=lambda url: not url.endswith(f"/{MANIFEST}")):
            remote.delete(url)

    def set_aside(self, name: str) -> None:
        token = self._token_of(name)
        manifest = remote.join(self.url, name, token, MANIFEST)
        remote.write_bytes(remote.join(self.url, name, token, f"{BAD}{MANIFEST}"), remote.read_bytes(manifest))
        remote.delete(manifest)

    def _manifests(self, file: str) -> dict[tuple[str, str], None]:
        """Of which checkpoint, and whose."""
        return dict.fromkeys(_place(url) for url in self._objects(f"step-*/*/{file}"))

    def _token_of(self, name: str) -> str:
        """Whose a committed one is. Raises FileNotFoundError where there is none."""
        tokens = [_place(url)[1] for url in self._objects(f"{name}/*/{MANIFEST}")]
        if not tokens:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.at(name))
        own = self._fence().token
        return max(tokens, key=lambda token: (token == own, token))

    def _objects(self, pattern: str) -> list[str]:
        try:
            return [file.url for file in remote.listing(remote.join(self.url, pattern))]
        except FileNotFoundError:
            return []

    def _fence(self) -> Fence:
        return Fence.read(lambda: remote.read_bytes(remote.join(self.url, FENCE)), self.url)


def _place(url: str) -> tuple[str, str]:
    """Of which checkpoint an object is, and who wrote it."""
    name, token, _ = url.rsplit("/", 3)[1:]
    return name, token


class _BucketReader:
    def __init__(self, url: str) -> None:
        self._url = url

    def read_into(self, start: int, buffer: memoryview) -> int:
        content = remote.read_range(self._url, start, start + len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Nothing is held open."""
