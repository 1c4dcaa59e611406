"""`manta stop`: request a run to save and exit, through a file in its directory, on whichever machine its controller is."""

import os
import time
from pathlib import Path

from manta.cluster.protocol import ExitCode
from manta.cluster.supervise.event_log import exit_code, read_events
from manta.cluster.supervise.requests import AT_ONCE
from manta.data.errors import InputError
from manta.launch.config import find_run
from manta.launch.control.status import STATES
from manta.launch.terminal import resume_hint
from manta.trainer.run_directory import RunDirectory

POLL_INTERVAL = 0.2  # seconds


def stop(run: Path, *, at_once: bool, timeout: float) -> str:
    """Request a stop and wait until the run has ended. Return a message about its end.

    Raises InputError if the run is not running, TimeoutError if it does not end in time.
    """
    run_dir = find_run(run)
    if not run_dir.is_locked:
        raise InputError(f"{run}: expected a running run, got one that is not running. Check it: manta status {run_dir.quoted}")
    events_before = len(read_events(run_dir.events_file))
    _request(run_dir, at_once=at_once)
    deadline = time.monotonic() + timeout
    while run_dir.is_locked and exit_code(read_events(run_dir.events_file)[events_before:]) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run_dir.path}: did not stop within {timeout:.0f} s; wait longer (--timeout) or use --at-once")
        if not run_dir.stop_request_file.exists():  # a run that was starting deleted it as the request of an earlier run
            _request(run_dir, at_once=at_once)
        time.sleep(POLL_INTERVAL)
    run_dir.stop_request_file.unlink(missing_ok=True)
    code = exit_code(read_events(run_dir.events_file)[events_before:])
    hint = "it had reached its last step" if code == ExitCode.DONE else resume_hint(run_dir)
    state = "" if code in (ExitCode.SAVED, ExitCode.INTERRUPTED) else f"{STATES.get(code, f'failed, see manta attach {run_dir.quoted}')}; "
    return state + hint


def _request(run_dir: RunDirectory, *, at_once: bool) -> None:
    try:
        with open(run_dir.stop_request_file, "ab", opener=_open_at_once) as file:
            if at_once:  # else an earlier request to stop at once stays
                file.truncate(0)
                file.write(AT_ONCE)
    except OSError as error:
        remedy = "Stop it as a user who may write there."
        raise InputError(f"{run_dir.stop_request_file}: expected a writable directory, got an error: {error.strerror}. {remedy}") from None


def _open_at_once(path: str, flags: int) -> int:
    """Open it, or fail: a named pipe would wait for a reader."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)
