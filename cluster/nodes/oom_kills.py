"""Has the kernel killed here for want of memory?

It counts such kills in the control group of what it killed; an agent's ranks are in the agent's own.
"""

from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def kills() -> int:
    """So far, in this process's control group; 0 where nobody counts."""
    for place in places(Path("/proc/self/cgroup").read_text()):
        with suppress(OSError):
            counted = dict(line.split() for line in place.read_text().splitlines())
            return int(counted.get("oom_kill", 0))
    return 0


def places(groups: str) -> list[Path]:
    """Where that may stand, likeliest first, by what /proc says of a process's groups. In a container it may name a group by its path on
    the host, and the group lies at the root.
    """
    found: list[Path] = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", maxsplit=2)
        if "memory" in controllers.split(","):
            root, file = GROUPS / "memory", "memory.oom_control"
        elif not controllers:
            root, file = GROUPS, "memory.events"
        else:
            continue
        found += [root / path.lstrip("/") / file, root / file]
    return found
