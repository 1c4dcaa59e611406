"""Locations: a local path, or the URL of a file or a directory in a store (s3://, gs://, https://, hf://, …)."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


@dataclass(frozen=True, slots=True, order=True)
class StoredFile:
    path: str
    """A local path or a URL."""
    size: int
    version: int | str
    """Changes with the content: mtime in ns; of an object its ETag, hash or time, whichever the store has, or empty."""


class FileListing(NamedTuple):
    files: dict[str, StoredFile | None]
    """By path or URL, sorted. None for a local file, which was not asked for its size yet."""
    is_directory: bool
    """Whether the location is a directory, which may hold other files as well."""
    boundary: str | None = None
    """Where links of a local directory or glob may lead; None for a file that was named itself: it may be a link to anywhere."""


def is_remote(location: str) -> bool:
    scheme = _SCHEME.match(location)
    return scheme is not None and scheme[1].lower() not in {"file", "local"}


def local_path(location: str) -> Path | None:
    """Return the path of a local location, or None for a URL."""
    return None if is_remote(location) else Path(location)


def absolute(location: str) -> str:
    """Return the location, with a local path made absolute."""
    return location if is_remote(location) else str(Path(location).absolute())


def resolve(location: str) -> str:
    """Return the location, with a local path made absolute and its links followed."""
    return location if is_remote(location) else str(Path(location).resolve())


def join(root: str, name: str) -> str:
    """Return the location of a name below a root. A name that is an absolute path or a URL is returned as it is."""
    if is_remote(name) or Path(name).is_absolute():
        return name
    return f"{root.rstrip('/')}/{name}" if is_remote(root) else str(Path(root, name))
