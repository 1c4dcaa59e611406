"""`python -m manta.launch.targets.pre_stop RUN.YAML RUN SECONDS`: what a pod does before it is taken down.

Kubernetes ends a pod by a SIGTERM to Ray, which takes the ranks with it. A preStop hook comes before: here the run's controller, where
it is in this pod, is told to leave, and the pod waits until neither controller nor ranks are left, so that they can save.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil

LOOK = 0.1  # seconds between two looks at what still runs


def leave(file: str, run: str, seconds: float) -> None:
    """`file`: the config that the controller was started with; `run`: the directory that ranks were started with."""
    deadline = time.monotonic() + seconds
    for controller in processes("manta.launch", file):
        with suppress(psutil.NoSuchProcess):
            controller.send_signal(signal.SIGTERM)
    while time.monotonic() < deadline and (any(processes("manta.launch", file)) or any(processes("manta.trainer", run))):
        time.sleep(LOOK)


def processes(module: str, argument: str) -> Iterator[psutil.Process]:
    """Those that were started as `python -m MODULE … ARGUMENT …`, and still run."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            arguments = process.cmdline()
            if module in arguments and argument in arguments and process.status() != psutil.STATUS_ZOMBIE:
                yield process


if __name__ == "__main__":
    leave(sys.argv[1], sys.argv[2], float(sys.argv[3]))
