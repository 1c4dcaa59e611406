"""Files in directories that others may have written: a link out of one could publish a private file of the user."""

import os
import stat
from pathlib import Path

from manta.data.errors import InputError, cut
from manta.data.storage.location import StoredFile


def boundary(directory: str) -> str:
    """Return the folder that links of a directory may lead to: the directory itself, with its own links followed.

    The files of a snapshot in the cache of Hugging Face are links to its repository's blobs: there, it is the repository.
    """
    real = Path(os.path.realpath(directory))
    for folder in (real, *real.parents):
        if folder.name == "snapshots" and folder.parent.name.startswith(("datasets--", "models--")):
            return str(folder.parent)
    return str(real)


def check_link(path: str, boundary: str) -> str:
    """Return a file or folder with all links followed. Raises InputError if it is outside of the boundary."""
    target = os.path.realpath(path)
    if not f"{target}/".startswith(f"{boundary.rstrip('/')}/"):
        remedy = f"Name {cut(target)} in data.sources, and remove the link"
        raise InputError(f"{cut(path)}: expected a link that stays in {boundary}, got one to {cut(target)}, which is not read. {remedy}.")
    return target


def regular_file(path: str, boundary: str | None) -> StoredFile:
    """Return a file of a directory with this boundary, or a file that the user named. Nothing is opened.

    Raises InputError for a link out of the boundary or to nothing, and for what is no regular file.
    """
    is_link = os.path.islink(path)  # noqa: PTH114  pathlib is too slow for many files
    if is_link and boundary is not None:
        check_link(path, boundary)
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError as error:
        if not is_link:
            raise
        problem = f"expected a file, got a link to {cut(os.readlink(path))} ({error.strerror})"  # noqa: PTH115
        raise InputError(f"{cut(path)}: {problem}. Restore that file, or remove the link.") from None
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a directory"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise InputError(f"{cut(path)}: expected a regular file, got {kind}. Remove it, or write its content to a file.")
    return StoredFile(path, status.st_size, status.st_mtime_ns)
