"""`manta stop`: a run is asked to save and leave by a file in its directory, wherever its controller is."""

import time
from pathlib import Path

from manta.cluster.protocol import ExitCode
from manta.cluster.supervise.event_log import read_events
from manta.cluster.supervise.requests import AT_ONCE
from manta.data.errors import InputError
from manta.launch.config import resume_config
from manta.launch.run.display import stands
from manta.trainer.run_directory import RunDirectory

LOOK = 0.2  # seconds


def stop(run: Path, *, at_once: bool, timeout: float) -> str:
    """Asks, waits until the run has ended, and tells where that leaves it.

    Raises InputError where nothing is running there that could be told, TimeoutError where it does not leave.
    """
    home = RunDirectory(resume_config(run).absolute().parent)
    if not home.is_locked:
        raise InputError(f"{run}: got a run that is not running, wants one that is; how it stands: manta status {home.quoted}")
    before = len(read_events(home.events_file))
    _ask(home, at_once=at_once)
    deadline = time.monotonic() + timeout
    while home.is_locked and not _codes(home, before):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{home.path}: was told, and has not left within {timeout:.0f} s; wait longer (--timeout), or --at-once")
        if not home.stop_request_file.exists():  # it was only beginning, and took this for what an earlier run had left
            _ask(home, at_once=at_once)
        time.sleep(LOOK)
    home.stop_request_file.unlink(missing_ok=True)
    return _told(home, _codes(home, before))


def _ask(home: RunDirectory, *, at_once: bool) -> None:
    try:
        if at_once:
            home.stop_request_file.write_bytes(AT_ONCE)
        else:
            home.stop_request_file.touch()  # what was told to leave at once stays so
    except OSError as error:
        raise InputError(
            f"{home.stop_request_file}: {error.strerror}; wants a directory that you may write to: the run is told there"
        ) from None


def _codes(home: RunDirectory, before: int) -> list[int]:
    """With which exit code it has ended since there were `before` events; empty while it has not."""
    return [event["exit_code"] for event in read_events(home.events_file)[before:] if event["event"] == "run-ended"]


def _told(home: RunDirectory, codes: list[int]) -> str:
    if codes[:1] == [ExitCode.DONE]:
        return "done: it had come to its last step"
    how: dict[int, str] = {ExitCode.SAVED: "", ExitCode.INTERRUPTED: "", ExitCode.UNSAVED: "could not save as it left; "}
    return (how.get(codes[0], f"failed, as manta attach {home.quoted} shows; ") if codes else "broken off; ") + stands(home)
