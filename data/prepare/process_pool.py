"""A pool of processes that work on input splits. If one dies, the preparation fails with the file and line that it was reading."""

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_int64
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any, TypeVar, cast

from manta.data.errors import InputError
from manta.data.prepare.encode import SplitTask

_NO_POSITION = -1

T = TypeVar("T")
Work = Callable[[SplitTask, c_int64], T]
"""A function of a task, which sets the number to its position in the split from time to time."""


class WorkerProcess:
    """A process that does one task after another."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, remote = cast("tuple[Connection, Connection]", context.Pipe())
        self._position: c_int64 = context.RawValue(c_int64, _NO_POSITION)  # in shared memory, which outlives the process
        self._process = context.Process(target=_serve, args=(remote, self._position), daemon=True)
        self._process.start()
        remote.close()

    def start(self, work: Work[T], task: SplitTask) -> None:
        """Start a task. If the process is dead, `result` raises."""
        self._split = task.split
        try:
            self.connection.send((work, task))
        except (BrokenPipeError, ConnectionResetError):
            return

    def result(self) -> Any:
        """Return the result of the task, or raise its error. Raises RuntimeError if the process died."""
        try:
            error, result = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            position = self._position.value
            near = self._split.name if position == _NO_POSITION else f"near {self._split.location(position)}"
            raise RuntimeError(
                f"{near}: a process died ({_cause(self._process.exitcode)}). Fix or remove the file, or try again."
            ) from None
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """Kill the process: it may be in the middle of hours of work."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def run_in_processes(work: Work[T], tasks: Sequence[SplitTask], count: int) -> Iterator[tuple[SplitTask, T]]:
    """Yield each task and its result in the order of completion. The first error ends all."""
    if min(count, len(tasks)) <= 1:
        yield from ((task, work(task, c_int64())) for task in tasks)
        return
    workers = [WorkerProcess() for _ in range(min(count, len(tasks)))]
    pending, idle, running = list(reversed(tasks)), list(workers), dict[Any, tuple[WorkerProcess, SplitTask]]()
    try:
        while pending or running:
            while pending and idle:
                worker, task = idle.pop(), pending.pop()
                worker.start(work, task)
                running[worker.connection] = worker, task
            for connection in wait([*running]):
                worker, task = running.pop(connection)
                yield task, worker.result()
                idle.append(worker)
    finally:
        for worker in workers:
            worker.close()


def _serve(connection: Connection, position: c_int64) -> None:
    """Do tasks until the parent kills this process or dies."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a thread per worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    Thread(target=_exit_with_parent, daemon=True).start()
    while True:
        work, task = connection.recv()
        position.value = _NO_POSITION
        try:
            answer: tuple[Exception | None, Any] = (None, work(task, position))
        except InputError as error:
            answer = (error, None)
        except Exception as error:  # noqa: BLE001  the parent raises it
            answer = (_picklable(error), None)
        connection.send(answer)


def _picklable(error: Exception) -> Exception:
    """Return the error with its traceback as a note; as a RuntimeError if it does not survive pickling."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  our own bytes
    except Exception:  # noqa: BLE001  whatever pickling raises
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(trace)
    return error


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"{name}, maybe out of memory" if name == "SIGKILL" else name
    return f"exit code {exitcode}"
