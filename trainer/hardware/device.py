"""Which device a rank computes on: asked here alone, so that torch, DeepSpeed and we never disagree."""

import os
import re
from pathlib import Path
from typing import Literal

import torch

from manta.data.errors import InputError


def device_type() -> Literal["cuda", "cpu"]:
    """A GPU where there is one, unless DS_ACCELERATOR says cpu."""
    wanted = os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"  # asked first: asking CUDA keeps a process from forking ranks
    return "cuda" if wanted and torch.cuda.is_available() else "cpu"


def check_gpus(devices: Path = Path("/dev")) -> None:
    """Raises InputError where there are GPUs that torch can not use: training would begin on the CPU, a hundred times slower."""
    hidden = not {name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")} - {"", "-1"}
    there = [device.name for device in devices.iterdir() if re.fullmatch(r"nvidia\d+", device.name)]
    if there and not hidden and not torch.cuda.is_available():
        remedy = "install torch's CUDA build and a driver that is new enough, or train on the CPU with CUDA_VISIBLE_DEVICES="
        raise InputError(f"this machine has {len(there)} GPUs, and torch {torch.__version__} sees none of them; {remedy}")
