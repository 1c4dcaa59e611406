"""A machine as Ray lists it, and facts about this one, found without torch, which takes seconds to import and would hold the GPU."""

import os
import re
import socket
import subprocess
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

DEVICES = Path("/dev")
IGNORED = ("NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
_NUMBER = re.compile(r"[0-9]{1,3}")
_LONGEST = 200  # characters of a value in a message


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
    visible = _visible_gpus()
    return _installed_gpus() if visible is None else len(visible)


def visible_gpus_problem() -> str | None:
    """Return what is wrong with CUDA_VISIBLE_DEVICES; None if nothing. CUDA would ignore a part of it, or all, without a word."""
    visible, installed = _visible_gpus() or [], _installed_gpus()
    numbers, mig = [name for name in visible if _NUMBER.fullmatch(name)], [name for name in visible if name.startswith("MIG-")]
    last = installed - 1 if installed else 999  # without device files, their number is unknown
    expected = None
    if len(set(visible)) < len(visible):
        expected = "each GPU once"
    elif numbers and any(name not in numbers or int(name) > last for name in visible):
        expected = f"numbers from 0 to {last}" if installed else "numbers of GPUs"
    elif not numbers and any(not name.startswith(("GPU-", "MIG-")) for name in visible):
        expected = "numbers of GPUs, or their UUIDs"
    elif mig and len(visible) > 1:
        expected = "one MIG device, because CUDA shows a process no more"
    value = ",".join(visible)[:_LONGEST]
    return None if expected is None else f"CUDA_VISIBLE_DEVICES: expected {expected}, got {value}. Correct it, or unset it to use all GPUs."


def ignored_gpu_variables() -> list[str]:
    """Describe the variables that name other GPUs than those that ranks see: they act on containers, or on other makers' GPUs."""
    found = gpus()
    selections = {name: os.environ[name] for name in IGNORED if name in os.environ and "CUDA_VISIBLE_DEVICES" not in os.environ}
    return [
        f"{name} has no effect here: {found} GPUs are visible. To choose among them, set CUDA_VISIBLE_DEVICES."
        for name, value in selections.items()
        if found and value not in {"", "all", "none", "void"} and len(value.split(",")) != found
    ]


def _visible_gpus() -> list[str] | None:
    """Return what CUDA_VISIBLE_DEVICES lists before the first empty name or -1, as CUDA reads it; None if it is unset."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if value is None else [name.strip() for name in value.split(",")]
    return None if names is None else list(takewhile(lambda name: name not in {"", "-1", "NoDevFiles"}, names))


def _installed_gpus() -> int:
    return sum(re.fullmatch(r"nvidia\d+", device.name) is not None for device in DEVICES.iterdir())


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
