"""A machine as Ray lists it, and facts about this one, found without torch, which takes seconds to import and would hold the GPU."""

import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A node as Ray lists it. Ray never reuses an `id`, not even for the same machine when it joins again."""

    id: str
    host: str
    address: str
    port: int  # of its raylet
    cpus: int
    gpus: int = 0
    nvlink_domain: str = ""

    def __str__(self) -> str:
        return f"{self.host} ({self.address})"


def address_towards(host: str, port: int = 9) -> str:
    """Return this machine's address on the route to another; sends nothing. Raises OSError if the host is unknown or has no route."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gpus() -> int:
    """Return the number of GPUs that a rank started from this process would see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in {"", "-1"}])
    return sum(re.fullmatch(r"nvidia\d+", device.name) is not None for device in Path("/dev").iterdir())


def default_ranks() -> int:
    """Return one rank per GPU; without a GPU two, so that a laptop run is a distributed run, or one on a single core."""
    return gpus() or min(2, cores())


def nvlink_domain() -> str:
    """Return the id of the NVLink fabric that this machine's GPUs share with other machines; "" if there is none."""
    try:
        report = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return parse_nvlink_domain(report)


def parse_nvlink_domain(report: str) -> str:
    """Return cluster and clique from the Fabric section of `nvidia-smi -q`."""
    cluster = re.search(r"^\s+ClusterUUID\s+: ([0-9a-f-]{36})$", report, re.MULTILINE)
    clique = re.search(r"^\s+CliqueId\s+: (\d+)$", report, re.MULTILINE)
    if cluster is None or not cluster[1].strip("0-"):
        return ""
    return f"{cluster[1]}-{clique[1] if clique else 0}"
