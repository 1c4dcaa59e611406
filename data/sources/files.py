"""Find the files that a path, a glob or a URL names."""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from manta.data.errors import InputError
from manta.data.storage import remote


@dataclass(frozen=True, slots=True)
class SourceFile:
    path: str
    """Or a URL."""
    size: int
    version: int | str
    """Changes with the content: a local file's modification time in ns; an object's ETag or time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileListing:
    files: dict[str, SourceFile | None]
    """By path; None for a local file that is not looked at yet."""
    is_directory: bool
    """A directory may contain files of unknown formats; a file or a glob names exactly what it means."""


def find_files(location: str) -> FileListing:
    """Return the files that a path, glob or URL names, sorted."""
    if remote.is_remote(location):
        return _find_objects(location)
    if Path(location).is_dir():
        return FileListing(files=dict.fromkeys(walk(location)), is_directory=True)
    paths = [location] if Path(location).is_file() else _match(location)
    return FileListing(files=dict.fromkeys(paths), is_directory=False)


def stat(path: str) -> SourceFile:
    status = Path(path).stat()
    return SourceFile(path, status.st_size, status.st_mtime_ns)


def walk(directory: str) -> Iterator[str]:
    """Yield every file below a directory, sorted, except hidden, installed and compiled ones."""
    seen: set[tuple[int, int]] = set()  # a link may lead back up
    for folder, children, names in os.walk(directory, onerror=_raise, followlinks=True):
        status = Path(folder).stat()
        if (inode := (status.st_dev, status.st_ino)) in seen:
            children[:] = []
            continue
        seen.add(inode)
        children[:] = sorted(child for child in children if child not in {"site-packages", "__pycache__"} and not child.startswith("."))
        yield from (str(Path(folder, name)) for name in sorted(names) if not name.startswith("."))


def without_dataset_metadata(location: str, paths: list[str]) -> list[str]:
    """Remove what `datasets` saves beside a dataset's tables: JSON metadata, and cached tables computed from them.

    Raises InputError for a dataset that was saved in several splits.
    """
    by_folder: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        by_folder.setdefault(folder, set()).add(name)
    for folder, names in by_folder.items():
        if "dataset_dict.json" in names:
            splits = ", ".join(sorted(other.rpartition("/")[2] for other, saved in by_folder.items() if "state.json" in saved))
            raise InputError(
                f"data.sources: {location!r}: expected one split of a dataset, got several. Name a folder of {folder}: {splits}."
            )
    metadata = {"state.json", "dataset_info.json"}
    saved = {folder for folder, names in by_folder.items() if metadata <= names and any(name.endswith(".arrow") for name in names)}
    parts = [(path, *path.rpartition("/")[::2]) for path in paths]
    return [path for path, folder, name in parts if folder not in saved or (name not in metadata and not name.startswith("cache-"))]


def _find_objects(url: str) -> FileListing:
    """List the objects of a URL. Over HTTP a URL that ends in a slash is a directory: it holds what the page links to."""
    page = url.startswith(("http://", "https://")) and url.endswith("/")
    try:
        objects = remote.listing(f"{url}**" if page else url)
    except FileNotFoundError:
        return FileListing(files={}, is_directory=False)
    path = _normalized(url)
    root = path if page or not glob.has_magic(url) else re.split(r"[*?[]", path)[0].rpartition("/")[0]
    below = {file.url: _normalized(file.url).removeprefix(root) for file in objects}
    hidden = {name for name, rest in below.items() if "/." in rest and "/." not in path.removeprefix(root)}
    files: dict[str, SourceFile | None] = {
        file.url: SourceFile(file.url, file.size, file.identity) for file in objects if file.url not in hidden
    }
    return FileListing(files=files, is_directory=root == path and any(below.values()))


def _normalized(url: str) -> str:
    """Remove the scheme and outer slashes: a store writes the same URL in several ways."""
    return url.partition("://")[2].strip("/")


def _raise(error: OSError) -> None:
    raise error


def _match(pattern: str) -> list[str]:
    paths = glob.glob(pattern, recursive=True)  # noqa: PTH207  Path.glob takes no absolute pattern
    return sorted(path for path in paths if Path(path).is_file())
