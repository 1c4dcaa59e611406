"""`python -m manta.launch.targets.pre_stop RUN.YAML RUN SECONDS`: the preStop hook of a pod.

Kubernetes ends a pod with a SIGTERM to Ray, which kills the ranks. The hook runs before that: it sends SIGTERM to the run's controller,
if that is in this pod, and waits until controller and ranks have exited, so that they can save.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil

POLL = 0.1  # seconds


def stop_run(file: str, run: str, seconds: float) -> None:
    """file: the config in the controller's arguments; run: the directory in those of the ranks."""
    deadline = time.monotonic() + seconds
    for controller in processes("manta.launch", file):
        with suppress(psutil.NoSuchProcess):
            controller.send_signal(signal.SIGTERM)
    while time.monotonic() < deadline and (any(processes("manta.launch", file)) or any(processes("manta.trainer", run))):
        time.sleep(POLL)


def processes(module: str, argument: str) -> Iterator[psutil.Process]:
    """Yield the running processes that were started as `python -m MODULE … ARGUMENT …`."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            arguments = process.cmdline()
            if module in arguments and argument in arguments and process.status() != psutil.STATUS_ZOMBIE:
                yield process


if __name__ == "__main__":
    stop_run(sys.argv[1], sys.argv[2], float(sys.argv[3]))
