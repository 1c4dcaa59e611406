"""Every file operation of a piece of code, found by tracing, and the same code killed at any one of them: real processes, real SIGKILL."""

import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path

KINDS = {"os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "remove", "os.rmdir": "rmdir"}  # as audit events name them


class Tracer:
    """Sees what this process does to files below `directory`, from here to its end."""

    def __init__(self, directory: Path, kill_at: int | None = None, *, halfway: bool = False) -> None:
        """kill_at: the operation before which this process kills itself; halfway: in the midst of it, where it writes."""
        self.seen: list[str] = []
        self._directory, self._kill_at, self._halfway = str(directory), kill_at, halfway
        self._write, self._fsync = os.write, os.fsync
        sys.addaudithook(self._hear)
        os.write, os.fsync = self._written, self._synced

    def _hear(self, event: str, given: tuple) -> None:
        if event == "open" and isinstance(given[0], str) and given[2] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            self._tell("open", given[0])
        elif event in KINDS:
            descriptor = given[-1] if event != "os.rename" else given[-2]
            self._tell(KINDS[event], self._path(given[0], descriptor))

    def _written(self, descriptor: int, content) -> int:
        self._tell("write", self._path_of(descriptor), lambda: self._write(descriptor, bytes(content)[: len(content) // 2]))
        return self._write(descriptor, content)

    def _synced(self, descriptor: int) -> None:
        # What a buffer has just written goes by no call that is seen here: half of it is taken back.
        def take_back() -> None:
            if os.path.isfile(path):  # noqa: PTH113  a Path's would be heard
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)

        path = self._path_of(descriptor)
        self._tell("fsync", path, take_back)
        self._fsync(descriptor)

    def _tell(self, kind: str, path: str, do_half: Callable[[], object] | None = None) -> None:
        if not path.startswith(self._directory):
            return
        self.seen.append(f"{kind} {path[len(self._directory) + 1 :]}")
        if len(self.seen) == self._kill_at:
            if self._halfway and do_half:
                do_half()
            os.kill(os.getpid(), signal.SIGKILL)

    def _path(self, path: str | bytes | os.PathLike, descriptor: int) -> str:
        return os.path.join(self._path_of(descriptor), path) if descriptor >= 0 else os.fspath(path)  # noqa: PTH118

    def _path_of(self, descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115


def traced(job: Callable[[], object], directory: Path, kill_at: int | None = None, *, halfway: bool = False) -> list[str] | None:
    """What `job` does in a child; None where it was killed on its way."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            tracer = Tracer(directory, kill_at, halfway=halfway)
            job()
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(tracer.seen, pipe)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert told, "the job raised"
    return pickle.loads(told)
