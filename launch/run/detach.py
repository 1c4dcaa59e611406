"""`--detach`: run the same command in a new session, so that closing the terminal does not end it."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from manta.cluster.protocol import ExitCode
from manta.cluster.supervise.event_log import read_events
from manta.launch.messages import notify
from manta.trainer.run_directory import RunDirectory

POLL_INTERVAL = 0.1  # seconds


def detach(run_dir: RunDirectory, arguments: Sequence[str]) -> int:
    """Start `manta` in the background. Return DONE once its controller has started; else show its output and return its exit code.

    Raises InputError if another process is running the run.
    """
    with run_dir.lock():
        run_dir.logs.mkdir(exist_ok=True)
        events_before = len(read_events(run_dir.events_file))
    file = run_dir.logs / "controller.log"
    with file.open("ab") as log:
        start = log.tell()
        command = [sys.executable, "-P", "-m", "manta.launch", *arguments]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while process.poll() is None and len(read_events(run_dir.events_file)) == events_before:
            time.sleep(POLL_INTERVAL)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        raise
    if process.returncode is not None:
        notify(file.read_bytes()[start:].decode(errors="replace").rstrip())
        return process.returncode if process.returncode >= 0 else 128 - process.returncode
    notify(f"{run_dir.path}: running in the background; its messages are in {file}")
    for purpose, subcommand in (("show progress", "attach"), ("show the ranks' logs", "logs --follow"), ("stop", "stop")):
        notify(f"  {purpose}: manta {subcommand} {run_dir.quoted}")
    return ExitCode.DONE
