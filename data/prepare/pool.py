"""Run work on all input splits of a source, on the cores of this machine or of a Ray cluster."""

import os
from collections.abc import Sequence

from manta.data.config import DataConfig
from manta.data.prepare.encode import SplitTask
from manta.data.prepare.process_pool import T, Work, run_in_processes
from manta.data.prepare.progress import progress


def run_tasks(title: str, work: Work[T], tasks: Sequence[SplitTask], data: DataConfig) -> dict[int, T]:
    """Return the result of each task by its index, and show progress. The first error ends all."""
    if data.ray_address is not None:
        from manta.data.prepare.ray_pool import run_on_ray  # Ray takes seconds to import

        completed = run_on_ray(work, tasks, data.ray_address)
    else:
        completed = run_in_processes(work, tasks, data.workers or _cores())
    sizes = {task.index: task.split.size or 1 for task in tasks}
    results: dict[int, T] = {}
    with progress(title, sum(sizes.values())) as advance:
        for task, result in completed:
            results[task.index] = result
            advance(sizes[task.index])
    return results


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
