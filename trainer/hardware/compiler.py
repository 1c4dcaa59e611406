"""What torch.compile needs beyond pip packages."""

import os
import shlex
import shutil
import sysconfig
from pathlib import Path

import torch

from manta.data.errors import InputError

REMEDY = "Install g++ and python3-dev (Debian), or set train.compile=false."


def require_compiler(device: str) -> None:
    """Raise InputError if the code that torch.compile writes for this kind of device cannot be built here."""
    variable, known = ("CC", ("gcc", "clang")) if device == "cuda" else ("CXX", ("g++",))  # Triton's choice, and Inductor's
    value = os.environ.get(variable)
    names = tuple(shlex.split(value)[:1]) if value else known
    if not any(map(shutil.which, names)):
        raise InputError(f"train.compile: expected a compiler on PATH, got no {' or '.join(names)}. {REMEDY}")
    if device == "cpu" and " " in torch.__file__:
        raise InputError(
            f"train.compile: expected torch's headers in a path without spaces, got {Path(torch.__file__).parent}."
            " Install it elsewhere, or omit train.compile."
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise InputError(f"train.compile: expected Python's headers, got no {header}. {REMEDY}")
