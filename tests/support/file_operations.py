"""Trace every file operation of a function, and kill it at any one of them: real processes, real SIGKILL."""

import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path

KINDS = {"os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "remove", "os.rmdir": "rmdir"}  # by name of the audit event


class Tracer:
    """Records what this process does to files below `directory`, until it ends."""

    def __init__(self, directory: Path, kill_at: int | None = None, *, halfway: bool = False) -> None:
        """kill_at: number of the operation before which this process kills itself. halfway: kill it during that operation, if it writes."""
        self.operations: list[str] = []
        self._directory, self._kill_at, self._halfway = str(directory), kill_at, halfway
        self._os_write, self._os_fsync = os.write, os.fsync
        sys.addaudithook(self._on_audit_event)
        os.write, os.fsync = self._write, self._fsync

    def _on_audit_event(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            self._record("open", arguments[0])
        elif event in KINDS:
            descriptor = arguments[-1] if event != "os.rename" else arguments[-2]
            self._record(KINDS[event], self._path(arguments[0], descriptor))

    def _write(self, descriptor: int, content) -> int:
        path = self._path_of(descriptor)
        self._record("write", path, lambda: self._os_write(descriptor, bytes(content)[: len(content) // 2]))
        return self._os_write(descriptor, content)

    def _fsync(self, descriptor: int) -> None:
        # Writes by a Python buffer are not seen; a kill during the sync truncates the file to half of what they wrote.
        def truncate() -> None:
            if os.path.isfile(path):  # noqa: PTH113  a Path's would be traced
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)

        path = self._path_of(descriptor)
        self._record("fsync", path, truncate)
        self._os_fsync(descriptor)

    def _record(self, kind: str, path: str, do_half: Callable[[], object] | None = None) -> None:
        if not path.startswith(self._directory):
            return
        self.operations.append(f"{kind} {path[len(self._directory) + 1 :]}")
        if len(self.operations) == self._kill_at:
            if self._halfway and do_half:
                do_half()
            os.kill(os.getpid(), signal.SIGKILL)

    def _path(self, path: str | bytes | os.PathLike, descriptor: int) -> str:
        return os.path.join(self._path_of(descriptor), path) if descriptor >= 0 else os.fspath(path)  # noqa: PTH118

    def _path_of(self, descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115


def traced(job: Callable[[], object], directory: Path, kill_at: int | None = None, *, halfway: bool = False) -> list[str] | None:
    """Run a job in a child process. Return its operations, or None if it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            tracer = Tracer(directory, kill_at, halfway=halfway)
            job()
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(tracer.operations, pipe)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert content, "the job raised"
    return pickle.loads(content)
