"""A pool of Ray actors, one per core of a cluster, that work on input splits.

All nodes must see the files and the corpus directory, and have manta installed. An actor works in a child process, so that a crash is
reported with its file and line. If a node is lost, another one does its splits.
"""

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from manta.data.errors import InputError
from manta.data.prepare.encode import SplitTask
from manta.data.prepare.process_pool import T, Work, WorkerProcess
from manta.data.prepare.progress import report

_MAX_LOSSES = 3  # of a split with its node
_QUEUE = 2  # splits per actor, so that it never waits for the next


class _SplitActor:
    def __init__(self) -> None:
        self._worker = WorkerProcess()

    def run(self, work: Work[T], task: SplitTask) -> T:
        self._worker.start(work, task)
        return self._worker.result()


def run_on_ray(work: Work[T], tasks: Sequence[SplitTask], address: str) -> Iterator[tuple[SplitTask, T]]:
    """Yield each task and its result in the order of completion. The first error ends all.

    Raises InputError if there is no cluster at the address.
    """
    if not tasks:
        return
    ray = _connect(address)
    try:
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0)(_SplitActor)
        actors = [actor.remote() for _ in range(min(cores, len(tasks)))]
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
                raise RuntimeError(f"{task.split.name}: lost {_MAX_LOSSES} times with its node: {_first_line(error)}") from None
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
