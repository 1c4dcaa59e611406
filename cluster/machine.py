"""What does this machine have? Asked without torch, which takes seconds to import and would hold the GPU."""

import os
import re
from pathlib import Path


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gpus() -> int:
    """GPUs that a rank started from here would see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in {"", "-1"}])
    return sum(re.fullmatch(r"nvidia\d+", device.name) is not None for device in Path("/dev").iterdir())


def default_ranks() -> int:
    """One rank a GPU; without a GPU two, so that a laptop run is a distributed run, or one on a single core."""
    return gpus() or min(2, cores())
