"""What torch.compile needs that pip does not bring."""

import os
import shlex
import shutil
import sysconfig
from pathlib import Path

import torch

from manta.data.errors import InputError


def ask_for_compiler(device: str) -> None:
    """Raises InputError where torch.compile could write code for this kind of device, and nothing here could build it."""
    variable, known = ("CC", ("gcc", "clang")) if device == "cuda" else ("CXX", ("g++",))  # what Triton looks for, and Inductor
    given = os.environ.get(variable)
    names = tuple(shlex.split(given)[:1]) if given else known
    remedy = "install them (Debian: g++ and python3-dev), or set train.compile=false"
    if not any(map(shutil.which, names)):
        raise InputError(f"train.compile wants a compiler, and there is no {' or '.join(names)} on PATH; {remedy}")
    if device == "cpu" and " " in torch.__file__:
        home = Path(torch.__file__).parent
        raise InputError(
            f"train.compile can not be had: torch's headers lie in {home}, a path with a space; install elsewhere or leave it out"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise InputError(f"train.compile wants Python's headers, and there is no {header}; {remedy}")
