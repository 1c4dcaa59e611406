"""The device that a rank computes on. Only this module decides it, so that torch, DeepSpeed and manta agree."""

import os
import re
from pathlib import Path
from typing import Literal

import torch

from manta.data.errors import InputError


def device_type() -> Literal["cuda", "cpu"]:
    """Return cuda if there is a GPU, unless DS_ACCELERATOR is cpu."""
    wants_gpu = os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"  # checked first: a process that has queried CUDA cannot fork ranks
    return "cuda" if wants_gpu and torch.cuda.is_available() else "cpu"


def check_gpus(devices: Path = Path("/dev")) -> None:
    """Raise InputError if there are GPUs that torch cannot use: training would run on the CPU, a hundred times slower."""
    hidden = not {name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")} - {"", "-1"}
    gpus = [device.name for device in devices.iterdir() if re.fullmatch(r"nvidia\d+", device.name)]
    if gpus and not hidden and not torch.cuda.is_available():
        raise InputError(
            f"GPU: expected torch to find this machine's {len(gpus)} GPUs, got none from torch {torch.__version__}."
            " Install torch's CUDA build and a recent driver, or train on the CPU with CUDA_VISIBLE_DEVICES=."
        )
