"""Where Ray's files go: sockets and logs in a folder for temporary files, its object store in shared memory if that can be written."""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

from manta.cluster.ray.errors import RayStartError
from manta.cluster.ray.hosts import OBJECT_STORE_BYTES

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  where Ray puts its object store
FOLDERS = (Path("/tmp"), Path("/var/tmp"), SHARED_MEMORY)  # noqa: S108
LONGEST_PATH = 19  # letters: the paths of Ray sockets below it must fit into 107 bytes
PREFIX, HOST_PREFIX = "manta-ray-", "manta-host-"
TOKEN = "token"  # noqa: S105  the name of its file
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


@contextlib.contextmanager
def token_file(scratch: Path, token: str) -> Generator[Path]:
    """Write Ray's token, without which anyone who reaches its ports could run code. Only its path is in an environment.

    The file is locked while the Ray runs: the lock tells a folder in use from one of a killed run. It is empty until it is locked.
    """
    path = scratch / TOKEN
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123  pathlib takes no mode
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(token)
        file.flush()
        yield path


def remove_stale_folders() -> None:
    """Remove the folders of this user's killed runs.

    Any user can make a folder of such a name here. What another user made is not even opened: opening a named pipe would wait for ever.
    """
    for directory in [path for folder in temporary_folders() for prefix in (PREFIX, HOST_PREFIX) for path in folder.glob(f"{prefix}*")]:
        with contextlib.suppress(OSError):  # locked, or just removed
            if not (_is_own(directory, stat.S_IFDIR) and _is_own(directory / TOKEN, stat.S_IFREG)):
                continue
            with open(directory / TOKEN, opener=_open_at_once) as token:
                status = os.fstat(token.fileno())
                if status.st_size or time.time() - status.st_mtime > 60:  # else it may not be locked yet
                    fcntl.flock(token, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(directory, ignore_errors=True)


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


def _is_own(path: Path, kind: int) -> bool:
    """Return whether this user made it and it is of that kind. Links are not followed."""
    status = path.lstat()
    return status.st_uid == os.geteuid() and stat.S_IFMT(status.st_mode) == kind


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
