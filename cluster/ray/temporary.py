"""Where Ray's files go: sockets and logs in a folder for temporary files, its object store in shared memory if that can be written."""

import os
import tempfile
from pathlib import Path

from manta.cluster.ray.errors import RayStartError
from manta.cluster.ray.hosts import OBJECT_STORE_BYTES

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  where Ray puts its object store
FOLDERS = (Path("/tmp"), Path("/var/tmp"), SHARED_MEMORY)  # noqa: S108
LONGEST_PATH = 19  # letters: the paths of Ray's sockets below it must fit into 107 bytes
SPACE = 16 << 20  # bytes that Ray needs for its logs


def temporary_folders() -> list[Path]:
    """Return where Ray's files may go: /tmp first, then the user's TMPDIR, unless it is too long."""
    own = [Path(os.environ[name]).absolute() for name in ("TMPDIR",) if os.environ.get(name)]
    return [path for path in (FOLDERS[0], *own, *FOLDERS[1:]) if len(str(path)) <= LONGEST_PATH]


def make_scratch(prefix: str) -> Path:
    """Make a private folder (0700) for the files of a Ray. Raises RayStartError if no folder has room for them."""
    reasons: list[str] = []
    for folder in temporary_folders():
        try:
            scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
            try:
                _allocate(scratch, SPACE)
            except OSError:
                scratch.rmdir()
                raise
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
        else:
            return scratch
    expected = f"a folder with {SPACE >> 20} MiB for Ray's sockets and logs"
    remedy = f"Free some space, or set TMPDIR to such a folder, with a path of at most {LONGEST_PATH} letters."
    raise RayStartError(f"expected {expected}, got {'; '.join(reasons)}. {remedy}")


def object_store_folder(scratch: Path) -> Path:
    """Return where a Ray with its files in `scratch` puts its object store, which stays almost empty."""
    try:
        _allocate(SHARED_MEMORY, OBJECT_STORE_BYTES)
    except OSError:
        return scratch
    return SHARED_MEMORY


def _allocate(folder: Path, size: int) -> None:
    """Raises OSError if the folder has no room for a file of that size."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)
