"""List a local directory or a glob, which others may have filled: no link leads out, no loop of links is followed twice."""
# ruff: noqa: PTH116, PTH118, PTH208
# pathlib is too slow for a million files.

import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from manta.data.storage.links import boundary, check_link

_UNREADABLE = {"lost+found"}  # on each file system's root
_NOT_A_CORPUS = {"site-packages", "__pycache__"} | _UNREADABLE


def walk(directory: str, *, follow_all: bool = False) -> Iterator[str]:
    """Yield every file below, sorted, without hidden, installed and compiled ones.

    Raises InputError for a folder that is a link out of the directory, unless `follow_all`, and PermissionError for a locked one.
    """
    for folder, names in _folders(directory, _NOT_A_CORPUS, None if follow_all else boundary(directory)):
        yield from (str(Path(folder, name)) for name in sorted(names) if not name.startswith("."))


def matches(path: str) -> tuple[list[str], str]:
    """Return the files that a glob matches, sorted, and the boundary of the folder that it names.

    Unlike glob.glob, it raises InputError for a folder that is a link out of the boundary, and PermissionError for a locked one. A file
    that several links lead to is listed once.
    """
    folder, pattern = _split_glob(path)
    root, first = boundary(folder), dict[tuple[str, str], str]()
    exists = stat.S_ISDIR(_mode(folder) or 0)
    for match in sorted(set(_matches(folder, pattern, root)) if exists else ()):
        parent, name = os.path.split(match)
        first.setdefault((os.path.realpath(parent), name), match)
    return list(first.values()), root


def _folders(directory: str, excluded: AbstractSet[str], root: str | None) -> Iterator[tuple[str, list[str]]]:
    """Yield a directory, every folder below it, and the names of its files. Links lead to folders below `root` only."""
    seen: set[tuple[int, int]] = set()  # a link may point to a parent
    for folder, children, names in os.walk(directory, onerror=_raise, followlinks=True):
        status = os.stat(folder)
        inode = (status.st_dev, status.st_ino)
        if inode in seen:
            children[:] = []
            continue
        seen.add(inode)
        children[:] = sorted(child for child in children if child not in excluded and not child.startswith("."))
        if root is not None:
            for child in children:
                check_link(f"{folder}/{child}", root)
        yield folder, names


def _split_glob(path: str) -> tuple[str, Sequence[str]]:
    """Split a glob into the folder that it names, and the rest. A folder that exists with wildcards in its name is meant."""
    folder, parts = Path(), Path(path).parts
    for index, part in enumerate(parts[:-1]):
        is_literal = not glob.has_magic(re.sub(r"\[[*?[]\]", "", part))  # glob.escape writes such brackets
        if not is_literal and not (folder / part).is_dir():
            return str(folder), parts[index:]
        folder /= re.sub(r"\[([*?[])\]", r"\1", part) if is_literal else part
    return str(folder), parts[-1:]


def _matches(folder: str, parts: Sequence[str], root: str) -> Iterator[str]:
    """Yield the files below a folder that the rest of a glob matches."""
    part, *rest = parts
    if part == "**":
        for below, _ in _folders(folder, _UNREADABLE, root):
            yield from _matches(str(Path(below)), rest or ["*"], root)
        return
    names = [part]
    if glob.has_magic(part):
        names = fnmatch.filter((name for name in os.listdir(folder) if name[0] != "." or part[0] == "."), part)
    for name in names:
        path = name if folder == "." else os.path.join(folder, name)
        if (mode := _mode(path)) is None or name in _UNREADABLE:
            continue
        if not rest and not stat.S_ISDIR(mode):
            yield path
        elif rest and stat.S_ISDIR(mode):
            check_link(path, root)
            yield from _matches(path, rest, root)


def _mode(path: str) -> int | None:
    """Return what a path is, or of a link to nothing what the link is; None if there is nothing."""
    for status in (os.stat, os.lstat):
        try:
            return status(path).st_mode
        except PermissionError:
            raise
        except OSError:  # no such file, a link to nothing, or to itself
            continue
    return None


def _raise(error: OSError) -> None:
    raise error
