"""What does this machine have? Asked without torch, which takes seconds to import and would hold the GPU."""

import os
import re
import socket
import subprocess
from pathlib import Path


def address_towards(host: str, port: int = 9) -> str:
    """This machine's on the way to another; nothing is sent there. Raises OSError where it can not be found, or there is no way."""
    family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])


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


def nvlink_island() -> str:
    """Which NVLink fabric this machine's GPUs belong to; empty where it shares none with others, or has none."""
    try:
        told = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return island_in(told)


def island_in(report: str) -> str:
    """The fabric that `nvidia-smi -q` names: cluster and clique, as they stand under Fabric."""
    cluster = re.search(r"^\s+ClusterUUID\s+: ([0-9a-f-]{36})$", report, re.MULTILINE)
    clique = re.search(r"^\s+CliqueId\s+: (\d+)$", report, re.MULTILINE)
    if cluster is None or not cluster[1].strip("0-"):
        return ""
    return f"{cluster[1]}-{clique[1] if clique else 0}"
