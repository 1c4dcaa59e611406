"""Processes that prepare pieces. One that dies says where it was: the whole fails with the file and line, and nobody is left behind."""

import ctypes
import multiprocessing
import os
import pickle
import queue
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, TypeVar, cast

from manta.data.errors import InputError
from manta.data.prepare.encode import Task, Tell

_NOWHERE = -1

T = TypeVar("T")
Work = Callable[[Task, Tell], T]


class Worker:
    """One process, that does one task after another."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = cast("tuple[Connection, Connection]", context.Pipe())
        lifeline, self._lifeline = cast("tuple[Connection, Connection]", context.Pipe(duplex=False))
        self._place: Any = context.RawValue(ctypes.c_int64, _NOWHERE)  # in memory that outlives the process
        self._process = context.Process(target=_serve, args=(theirs, lifeline, self._place), daemon=True)
        self._process.start()
        theirs.close()
        lifeline.close()

    def run(self, work: Work[T], task: Task) -> T:
        """Raises what the work raises there, and RuntimeError where the process dies of it."""
        try:
            self._ours.send((work, task))
            error, result = self._ours.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            place = int(self._place.value)
            near = task.piece.name if place == _NOWHERE else f"near {task.piece.location(place)}"
            raise RuntimeError(f"{near}: a process died of it ({_cause(self._process.exitcode)}); mend it there, or run again") from None
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """At once: it may be in the midst of hours of work that nobody wants any more."""
        self._process.kill()
        self._process.join()
        self._ours.close()
        self._lifeline.close()


def run_all(work: Work[T], tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, T]]:
    """Each task and what came of it, as they come. The first error of any ends all."""
    count = min(workers, len(tasks))
    if count <= 1:
        yield from ((task, work(task, _unheard)) for task in tasks)
        return
    idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
    fleet = [Worker() for _ in range(count)]
    for worker in fleet:
        idle.put(worker)

    def run(task: Task) -> T:
        worker = idle.get()
        if worker is None:
            raise CancelledError
        try:
            result = worker.run(work, task)
        except BaseException:
            idle.put(None)  # not the worker: it may be dead, and another's task would be blamed
            raise
        idle.put(worker)
        return result

    threads = ThreadPoolExecutor(count)
    try:
        waiting = {threads.submit(run, task): task for task in tasks}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in fleet:
            worker.close()
        threads.shutdown()


def _serve(pipe: Connection, lifeline: Connection, place: Any) -> None:
    """One thread a worker, and no worker left behind: it ends when the other end of its lifeline is closed, by will or by death."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to tell of
    Thread(target=_leave_with, args=(lifeline,), daemon=True).start()

    def tell(come_to: int) -> None:
        place.value = come_to

    while True:
        work, task = pipe.recv()
        place.value = _NOWHERE
        try:
            answer: tuple[Exception | None, Any] = (None, work(task, tell))
        except InputError as error:
            answer = (error, None)
        except Exception as error:  # noqa: BLE001  it is raised again, where people see it
            answer = (_portable(error), None)
        pipe.send(answer)


def _portable(error: Exception) -> Exception:
    """The error, with where it was raised; what does not survive the way to another process is told in words."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  our own bytes
    except Exception:  # noqa: BLE001  whatever pickling raises
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(trace)
    return error


def _unheard(place: int) -> None:
    """In this very process: should it die, nobody is left to say where."""
    del place


def _leave_with(lifeline: Connection) -> None:
    lifeline.poll(None)
    os._exit(1)


def _cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"{name}, maybe out of memory" if name == "SIGKILL" else name
    return f"exit code {exitcode}"
