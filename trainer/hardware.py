"""What this machine offers: its device, its compiler and its peak speed."""

import os
import re
import shlex
import shutil
import sysconfig
import time
from pathlib import Path
from typing import Literal

import torch
import yaml

from manta.data.errors import InputError

COMPILER_REMEDY = "Install g++ and python3-dev (Debian), or set train.compile=false."
PEAKS: dict[str, float] = yaml.safe_load(Path(__file__).with_name("peak_tflops.yaml").read_text(encoding="utf-8"))


def device_type() -> Literal["cuda", "cpu"]:
    """Return cuda if there is a GPU, unless DS_ACCELERATOR is cpu. Only this decides it, so that torch, DeepSpeed and manta agree."""
    wants_gpu = os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"  # checked first: a process that has queried CUDA cannot fork ranks
    return "cuda" if wants_gpu and torch.cuda.is_available() else "cpu"


def check_gpus(devices: Path = Path("/dev")) -> None:
    """Raise InputError if there are GPUs that torch cannot use: training would run on the CPU, a hundred times slower."""
    hidden = not {name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")} - {"", "-1"}
    gpus = [device.name for device in devices.iterdir() if re.fullmatch(r"nvidia\d+", device.name)]
    if gpus and not hidden and not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        expected, got = f"torch to find this machine's {len(gpus)} GPUs", f"none from torch {torch.__version__}"
        correct = "Install torch's CUDA build and a recent driver" if visible is None else f"Correct CUDA_VISIBLE_DEVICES={visible[:200]}"
        remedy = f"{correct}, or train on the CPU with CUDA_VISIBLE_DEVICES=."
        raise InputError(f"GPU: expected {expected}, got {got}. {remedy}")


def require_compiler(device: str) -> None:
    """Raise InputError if the code that torch.compile writes for this kind of device cannot be built here."""
    variable, known = ("CC", ("gcc", "clang")) if device == "cuda" else ("CXX", ("g++",))  # Triton's choice, and Inductor's
    value = os.environ.get(variable)
    names = tuple(shlex.split(value)[:1]) if value else known
    if not any(map(shutil.which, names)):
        raise InputError(f"train.compile: expected a compiler on PATH, got no {' or '.join(names)}. {COMPILER_REMEDY}")
    if device == "cpu" and " " in torch.__file__:
        expected, got = "torch's headers in a path without spaces", Path(torch.__file__).parent
        raise InputError(f"train.compile: expected {expected}, got {got}. Install it elsewhere, or omit train.compile.")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise InputError(f"train.compile: expected Python's headers, got no {header}. {COMPILER_REMEDY}")


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return a GPU's bf16 peak by its name; None if it is not listed, or for another dtype.

    A CPU's peak is measured by matrix products in `dtype` and in fp32, and the faster counts: without AMX bf16 is slower than fp32.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((1e12 * peak for key, peak in PEAKS.items() if key in name), None) if dtype is torch.bfloat16 else None
    side = 512
    seconds = min(_product_seconds(torch.ones(side, side, dtype=kind)) for _ in range(12) for kind in {dtype, torch.float32})
    return 2 * side**3 / seconds


def _product_seconds(square: torch.Tensor) -> float:
    """Time one product, short enough to fall between interruptions by other processes."""
    start = time.perf_counter()
    torch.mm(square, square)
    return time.perf_counter() - start
