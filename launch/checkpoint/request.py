"""`manta checkpoint now`: a checkpoint of a run that is training, at once."""

import time
from pathlib import Path

from manta.data.errors import InputError
from manta.launch.config import resume_config
from manta.trainer.checkpoint.errors import SaveError
from manta.trainer.run_directory import RunDirectory

POLL = 0.2  # seconds


def now(run: Path, *, timeout: float) -> str:
    """Asks, waits, and gives the checkpoint's path. Raises InputError where nothing is training there, SaveError where none came of it."""
    home = RunDirectory(resume_config(run).absolute().parent)
    if not home.is_locked:
        raise InputError(f"{run}: got a run that is not running, wants one that trains; go on with it: manta resume {home.quoted}")
    before = set(home.open_checkpoints().names())
    home.save_request_file.touch()
    deadline = time.monotonic() + timeout
    while home.save_request_file.exists():
        if not home.is_locked:
            home.save_request_file.unlink(missing_ok=True)
            break  # it has ended, and saved as it did
        if time.monotonic() > deadline:
            home.save_request_file.unlink(missing_ok=True)
            raise SaveError(
                f"{home.path}: no checkpoint within {timeout:.0f} s; wants one step's time and a save's: wait longer (--timeout)"
            )
        time.sleep(POLL)
    after = home.open_checkpoints().names()
    if not after or after[0] in before:
        raise SaveError(f"{home.path}: could not save; {home.path / 'logs'} says why")
    return home.open_checkpoints().location(after[0])
