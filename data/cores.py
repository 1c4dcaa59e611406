"""The cores that a process may use: of its affinity, and of the CPU quota of the container that it is in."""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def cores(root: Path = Path("/")) -> int:
    """Return their number. root: where /proc and /sys are."""
    return max(1, min(len(os.sched_getaffinity(0)), *map(math.ceil, _quotas(root)), 2**16))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quota in cores of each control group that this process is in; of one in a container, only the outermost is visible."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = (root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup/cpu" if controllers else root / "sys/fs/cgroup/unified")
        for mount in mounts:
            group = mount / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder == mount.parent:
                    break
                if (quota := _quota(folder)) is not None:
                    yield quota


def _quota(group: Path) -> float | None:
    """Return the quota of a group of version 2 or 1; None if it has none."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):  # no such group here, or "max"
        return None
