"""Count the processes that the kernel killed because memory ran out.

The kernel counts such kills per control group of the killed process; an agent's ranks are in the agent's own group.
"""

from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def count_oom_kills() -> int:
    """Return the kills so far in this process's control group; 0 if the kernel does not count them."""
    for file in counter_files(Path("/proc/self/cgroup").read_text(encoding="utf-8")):
        with suppress(OSError):
            counters = dict(line.split() for line in file.read_text(encoding="utf-8").splitlines())
            return int(counters.get("oom_kill", 0))
    return 0


def counter_files(cgroups: str) -> list[Path]:
    """Return the files that may hold the counter, likeliest first. cgroups: content of /proc/self/cgroup.

    In a container it may name a group by its path on the host, while the group is mounted at the root.
    """
    files: list[Path] = []
    for line in cgroups.splitlines():
        _, controllers, path = line.split(":", maxsplit=2)
        if not controllers:  # version 2 of control groups
            files += [CGROUPS / path.lstrip("/") / "memory.events", CGROUPS / "memory.events"]
        elif "memory" in controllers.split(","):
            files += [CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control", CGROUPS / "memory/memory.oom_control"]
    return files
