"""A preparation on many machines: an actor for each core of a Ray cluster, that prepares one piece after another.

All nodes see the files, the corpus directory and an installed manta. An actor does its work in a process of its own, so that one that
dies tells file and line; a piece whose node is lost is done by another.
"""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from manta.data.errors import InputError
from manta.data.prepare.encode import Task
from manta.data.prepare.process_pool import T, Work, Worker
from manta.data.prepare.progress import say

_LOSSES = 3  # a piece that is lost with its node so often is not begun again
_QUEUE = 2  # pieces an actor has at hand, so that it never waits for the next


class _Encoder:
    """On some node, for as long as the preparation lasts."""

    def __init__(self) -> None:
        self._worker = Worker()

    def run(self, work: Work[T], task: Task) -> T:
        return self._worker.run(work, task)


def run_on_ray(work: Work[T], tasks: Sequence[Task], address: str) -> Iterator[tuple[Task, T]]:
    """Each task and what came of it, as they come. The first error of any ends all.

    Raises InputError where no cluster is found at the address.
    """
    if not tasks:
        return
    ray = _connected(address)
    try:
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        encoder = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0)(_Encoder)
        fleet = [encoder.remote() for _ in range(min(cores, len(tasks)))]
        say(f"prepare: {len(fleet)} cores of {len(ray.nodes())} nodes of the Ray cluster at {address}")
        yield from _deal(ray, fleet, work, tasks)
    finally:
        ray.shutdown()


def _deal(ray: Any, fleet: list[Any], work: Work[T], tasks: Sequence[Task]) -> Iterator[tuple[Task, T]]:
    ahead = list(reversed(tasks))
    losses: dict[int, int] = {}
    running: dict[Any, tuple[Any, Task]] = {}
    for actor in [*fleet] * _QUEUE:
        _give(actor, ahead, running, work)
    while running:
        done = ray.wait(list(running), num_returns=1)[0][0]
        actor, task = running.pop(done)
        try:
            result = ray.get(done)
        except ray.exceptions.RayActorError as error:  # its node, or it; it comes back where there is room
            losses[task.index] = losses.get(task.index, 0) + 1
            if losses[task.index] == _LOSSES:
                raise RuntimeError(f"{task.piece.name}: lost {_LOSSES} times with its node; the last: {_first_line(error)}") from None
            say(f"prepare: {task.piece.name} was lost with its node, and is begun again")
            ahead.append(task)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        else:
            yield task, result
        _give(actor, ahead, running, work)


def _give(actor: Any, ahead: list[Task], running: dict[Any, tuple[Any, Task]], work: Work[T]) -> None:
    if ahead:
        task = ahead.pop()
        running[actor.run.remote(work, task)] = actor, task


def _connected(address: str) -> Any:
    import ray

    wants = "the address of a running Ray cluster, auto on one of its nodes; start one with ray start"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host:  # Ray itself would ask for minutes
            socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise InputError(f"data.ray_address: got {address!r} ({_first_line(error)}), wants {wants}") from None
    home = Path.cwd()
    os.chdir("/")  # Ray puts the driver's folder first on its workers' path, and a data.py there would be taken for another's
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"data.ray_address: got {address!r} ({_first_line(error)}), wants {wants}") from None
    finally:
        os.chdir(home)
    return ray


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
