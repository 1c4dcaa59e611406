"""`--detach`: the same command once more, in a session of its own, where no terminal that closes takes it along."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from manta.cluster.supervise.event_log import read_events
from manta.launch.run.display import say
from manta.trainer.run_directory import RunDirectory

LOOK = 0.1  # seconds


def detach(home: RunDirectory, arguments: Sequence[str]) -> int:
    """Returns once the run is another process's, and its controller at work; else shows why not, and gives the exit code.

    Raises InputError where the directory can not be claimed.
    """
    with home.lock():
        home.logs.mkdir(exist_ok=True)
        before = len(read_events(home.events_file))
    file = home.logs / "controller.log"
    with file.open("ab") as log:
        start = log.tell()
        command = [sys.executable, "-P", "-m", "manta.launch", *arguments]
        there = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while there.poll() is None and len(read_events(home.events_file)) == before:
            time.sleep(LOOK)
    except KeyboardInterrupt:
        there.send_signal(signal.SIGINT)
        raise
    if there.returncode is not None:
        say(file.read_bytes()[start:].decode(errors="replace").rstrip())
        return there.returncode if there.returncode >= 0 else 128 - there.returncode
    say(f"{home.path}: goes on in the background; what it has to say is in {file}")
    for what, command in (("see it", "attach"), ("its ranks' logs", "logs --follow"), ("stop it", "stop")):
        say(f"  {what}: manta {command} {home.quoted}")
    return 0
