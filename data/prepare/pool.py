"""Run work on all input splits of a source, in processes of this machine or on the cores of a Ray cluster.

If a process dies, the preparation fails with the file and line that it was reading. On Ray, all nodes must see the files and the corpus
directory, and have manta installed. An actor works in a child process, so that a crash is reported in the same way. If a node is lost,
another one does its splits.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import socket
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_int64
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar, cast

from manta.data.config import DataConfig
from manta.data.cores import cores
from manta.data.errors import DataError, InputError
from manta.data.prepare.encode import SplitTask
from manta.data.prepare.progress import progress, report

_NO_POSITION = -1
_MAX_LOSSES = 3  # of a split with its node
_WORTH_A_PROCESS = 2_000_000  # bytes
_BLAS_THREADS = "OPENBLAS_NUM_THREADS"
_QUEUE = 2  # splits per Ray actor, so that it never waits for the next

T = TypeVar("T")
Work = Callable[[SplitTask, c_int64], T]
"""A function of a task, which sets the number to its position in the split from time to time."""


def run_tasks(title: str, work: Work[T], tasks: Sequence[SplitTask], data: DataConfig) -> dict[int, T]:
    """Return the result of each task by its index, and show progress. The first error ends all."""
    if data.ray_address is not None:
        completed = run_on_ray(work, tasks, data.ray_address)
    else:
        completed = run_in_processes(work, tasks, data.workers or _default_workers(tasks))
    sizes = {task.index: task.split.size or 1 for task in tasks}
    results: dict[int, T] = {}
    with progress(title, sum(sizes.values())) as advance:
        for task, result in completed:
            results[task.index] = result
            advance(sizes[task.index])
    return results


def _default_workers(tasks: Sequence[SplitTask]) -> int:
    """Return one worker per core, but no more than there is work for: a process takes a second to start, for each source again."""
    sizes = [task.split.size for task in tasks]
    return cores() if 0 in sizes else min(cores(), 1 + sum(sizes) // _WORTH_A_PROCESS)  # a dataset of the hub has no size


class WorkerProcess:
    """A process that does one task after another."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, remote = cast("tuple[Connection, Connection]", context.Pipe())
        self._position: c_int64 = context.RawValue(c_int64, _NO_POSITION)  # in shared memory, which outlives the process
        self._process = context.Process(target=_serve, args=(remote, self._position), daemon=True)
        own = os.environ.get(_BLAS_THREADS)
        os.environ[_BLAS_THREADS] = "1"  # else NumPy starts a thread per core in each process
        try:
            self._process.start()
        finally:
            del os.environ[_BLAS_THREADS]
            if own is not None:
                os.environ[_BLAS_THREADS] = own
            remote.close()

    def start(self, work: Work[T], task: SplitTask) -> None:
        """Start a task. If the process is dead, `result` raises."""
        self._split = task.split
        try:
            self.connection.send((work, task))
        except (BrokenPipeError, ConnectionResetError):
            return

    def result(self) -> Any:
        """Return the result of the task, or raise its error. Raises DataError if the process died."""
        try:
            error, result = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            position = self._position.value
            near = self._split.name if position == _NO_POSITION else f"near {self._split.places.location(position)}"
            died = f"a process died ({_cause(self._process.exitcode)})"
            raise DataError(
                f"{near}: {died}. Run the same command again, which resumes; if it dies again, fix or remove the file."
            ) from None
        if error is not None:
            raise error
        return result

    def run(self, work: Work[T], task: SplitTask) -> T:
        """Do a task. Raises as `result` does."""
        self.start(work, task)
        return self.result()

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
    workers = _start(min(count, len(tasks)))
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


def _start(count: int) -> list[WorkerProcess]:
    """Start this number of processes, or those that the limits of this user or container allow. Raises DataError if there are none."""
    workers: list[WorkerProcess] = []
    try:
        while len(workers) < count:
            workers.append(WorkerProcess())
    except OSError as error:
        problem = f"data.workers: expected to start {count} processes, got {len(workers)} ({error.strerror})"
        if not workers:
            raise DataError(f"{problem}. Set data.workers=1, or raise the limit of processes (ulimit -u).") from None
        report(f"{problem}. It continues with these.")
    return workers


def run_on_ray(work: Work[T], tasks: Sequence[SplitTask], address: str) -> Iterator[tuple[SplitTask, T]]:
    """Yield each task and its result in the order of completion. The first error ends all.

    Raises InputError if there is no cluster at the address.
    """
    if not tasks:
        return
    ray = _connect(address)
    try:
        available = max(1, int(ray.cluster_resources().get("CPU", 1)))
        actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0)(WorkerProcess)
        actors = [actor.remote() for _ in range(min(available, len(tasks)))]
        report(f"prepare: {len(actors)} cores on {len(ray.nodes())} nodes of the Ray cluster at {address}")
        yield from _run(ray, actors, work, tasks)
    finally:
        ray.shutdown()


def _run(ray: Any, actors: list[Any], work: Work[T], tasks: Sequence[SplitTask]) -> Iterator[tuple[SplitTask, T]]:
    pending, losses = list(reversed(tasks)), Counter[int]()
    idle, running = deque(actors * _QUEUE), dict[Any, tuple[Any, SplitTask]]()
    while pending or running:
        while pending and idle:
            actor, task = idle.popleft(), pending.pop()
            running[actor.run.remote(work, task)] = actor, task
        done = ray.wait(list(running), num_returns=1)[0][0]
        actor, task = running.pop(done)
        idle.append(actor)  # last: an actor that was idle before takes a lost split, not the one that lost it
        try:
            result = ray.get(done)
        except ray.exceptions.RayActorError as error:  # Ray restarts the actor on free cores
            losses[task.index] += 1
            if losses[task.index] == _MAX_LOSSES:
                raise DataError(f"{task.split.name}: lost {_MAX_LOSSES} times with its node: {_first_line(error)}") from None
            report(f"prepare: {task.split.name} was lost with its node and is started again")
            pending.append(task)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        else:
            yield task, result


def _connect(address: str) -> Any:
    import ray

    host, _, port = address.removeprefix("ray://").rpartition(":")
    directory = Path.cwd()
    try:
        if host:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=5).close()
        os.chdir("/")  # Ray puts the driver's directory first on its workers' path, where a data.py would hide another package
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (OSError, ValueError, RuntimeError) as error:  # Ray raises ConnectionError, an OSError
        problem = f"expected the address of a running Ray cluster, or auto on one of its nodes, got {address!r} ({_first_line(error)})"
        raise InputError(f"data.ray_address: {problem}. Start one with ray start.") from None
    finally:
        os.chdir(directory)
    return ray


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _serve(connection: Connection, position: c_int64) -> None:
    """Do tasks until the parent kills this process or dies."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a thread per worker
    umask = os.umask(0o022)
    os.umask(umask if umask & 0o002 else umask | 0o022)  # on a Ray cluster it is that of the user who started it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    Thread(target=_exit_with_parent, daemon=True).start()
    while True:
        work, task = connection.recv()
        position.value = _NO_POSITION
        try:
            answer: tuple[Exception | None, Any] = (None, work(task, position))
        except Exception as error:  # noqa: BLE001  the parent raises it
            answer = (error if isinstance(error, InputError | DataError) else _picklable(error), None)
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
        name = next((known.name for known in signal.Signals if known == -exitcode), f"signal {-exitcode}")
        return f"{name}, maybe out of memory: fewer data.workers need less" if name == "SIGKILL" else name
    return f"exit code {exitcode}"
