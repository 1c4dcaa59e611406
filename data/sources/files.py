"""Which files a path, a glob or a URL names, and what tells that one of them is still the same."""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from manta.data.errors import InputError
from manta.data.storage import remote


@dataclass(frozen=True, slots=True)
class File:
    path: str
    """Or a URL."""
    size: int
    version: int | str
    """When a local file was last changed, in ns; of an object, what its store calls its content: an ETag, or a time."""


def find(where: str) -> tuple[dict[str, File | None], bool]:
    """The files that a path or URL names, and whether it is a directory, where others may lie among them."""
    if remote.is_remote(where):
        return _objects(where)
    if Path(where).is_dir():
        return dict.fromkeys(walk(where)), True
    return dict.fromkeys([where] if Path(where).is_file() else _match(where)), False


def _objects(url: str) -> tuple[dict[str, File | None], bool]:
    """Over HTTP a directory is a page like any other: it is one where the URL ends in a slash, and holds what the page links to."""
    page = url.startswith(("http://", "https://")) and url.endswith("/")
    try:
        listed = remote.listing(f"{url}**" if page else url)
    except FileNotFoundError:
        return {}, False
    path = _bare(url)
    root = path if page or not glob.has_magic(url) else re.split(r"[*?[]", path)[0].rpartition("/")[0]
    below = {file.url: _bare(file.url).removeprefix(root) for file in listed}
    hidden = {name for name, rest in below.items() if "/." in rest and "/." not in path.removeprefix(root)}
    found: dict[str, File | None] = {file.url: File(file.url, file.size, file.identity) for file in listed if file.url not in hidden}
    return found, root == path and any(below.values())


def _bare(url: str) -> str:
    """A store spells one place in several ways; without its scheme and the slashes at its ends there is one."""
    return url.partition("://")[2].strip("/")


def without_notes(where: str, paths: list[str]) -> list[str]:
    """Without what `datasets` saves beside a dataset's tables: notes in JSON, and tables that it computed from them."""
    by_folder: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        by_folder.setdefault(folder, set()).add(name)
    for folder, names in by_folder.items():
        if "dataset_dict.json" in names:
            splits = ", ".join(sorted(other.rpartition("/")[2] for other, saved in by_folder.items() if "state.json" in saved))
            raise InputError(
                f"data.sources: {where!r}: a dataset in several splits; wants one of them: name a folder of {folder}: {splits}"
            )
    notes = {"state.json", "dataset_info.json"}
    saved = {folder for folder, names in by_folder.items() if notes <= names and any(name.endswith(".arrow") for name in names)}
    parts = [(path, *path.rpartition("/")[::2]) for path in paths]
    return [path for path, folder, name in parts if folder not in saved or (name not in notes and not name.startswith("cache-"))]


def walk(directory: str) -> Iterator[str]:
    """Every file below, sorted; what is installed, compiled or hidden is not part of a corpus."""
    seen: set[tuple[int, int]] = set()  # a link may lead back up
    for folder, children, names in os.walk(directory, onerror=_raise, followlinks=True):
        status = Path(folder).stat()
        if (place := (status.st_dev, status.st_ino)) in seen:
            children[:] = []
            continue
        seen.add(place)
        children[:] = sorted(child for child in children if child not in {"site-packages", "__pycache__"} and not child.startswith("."))
        yield from (str(Path(folder, name)) for name in sorted(names) if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _match(pattern: str) -> list[str]:
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207  Path.glob takes no absolute pattern
    return sorted(path for path in found if Path(path).is_file())


def stat(path: str) -> File:
    status = Path(path).stat()
    return File(path, status.st_size, status.st_mtime_ns)
