"""Locations: a local path, or the URL of a file or a directory in a store (s3://, gs://, https://, hf://, …)."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from manta.data.errors import has_password

T = TypeVar("T")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_LOCAL = re.compile(r"^(file|local)://(?=/)", re.IGNORECASE)


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
    return None if is_remote(location) else Path(_LOCAL.sub("", location))


def absolute(location: str) -> str:
    """Return the location, with a local path made absolute."""
    path = local_path(location)
    return location if path is None else str(path.absolute())


def expand(location: str) -> str:
    """Return what a user wrote as a path or URL, with `~` replaced by the home directory. Raises ValueError unless it can be one."""
    if re.search(r"[\0-\x1f\x7f]", location):
        raise ValueError(f"expected a path, got {location!r}. Remove the control characters.")
    if is_remote(location):
        if has_password(location):
            raise ValueError(f"expected a URL without a password, got {location}. Set the store's credentials in the environment.")
        return location
    prefix = "hf:" if location.startswith("hf:") else ""
    path = os.path.expanduser(location.removeprefix(prefix))  # noqa: PTH111  Path would shorten an empty path and `./~`
    if path.startswith("~"):
        user = path.partition("/")[0]
        raise ValueError(f"expected a path, got {location!r}, and there is no user {user[1:]}. For a file of this name, write ./{user}.")
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        raise ValueError(f"expected a path in the encoding {encoding}, got {location!a}. Set LC_ALL=C.UTF-8.") from None
    if len(encoded) > 4000 or max(map(len, encoded.split(b"/"))) > 255:
        raise ValueError(f"expected a path of at most 4000 bytes, each name of at most 255, got {location!r}. Shorten it.")
    return prefix + path


def expand_local(path: T) -> T:
    """Return the same for a path that must be local. A value of another type is returned as it is."""
    if not isinstance(path, str | Path):
        return path
    if is_remote(str(path)):
        raise ValueError(f"expected a path of this machine, got {path}. Choose a local one.")
    return type(path)(_LOCAL.sub("", expand(str(path))))


def check_local(path: T) -> T:
    """Return a path of another machine, which may have another home directory. Raises ValueError as `expand_local` does."""
    expand_local(path)
    return path


def resolve(location: str) -> str:
    """Return the location, with a local path made absolute and its links followed."""
    return location if is_remote(location) else str(Path(location).resolve())


def join(root: str, name: str) -> str:
    """Return the location of a name below a root. A name that is an absolute path or a URL is returned as it is."""
    if is_remote(name) or Path(name).is_absolute():
        return name
    return f"{root.rstrip('/')}/{name}" if is_remote(root) else str(Path(root, name))
