"""`manta checkpoint now`: request a checkpoint of a training run."""

import time
from pathlib import Path

from manta.data.errors import InputError
from manta.launch.config import resume_config
from manta.trainer.checkpoint.errors import SaveError
from manta.trainer.run_directory import RunDirectory

POLL = 0.2  # seconds


def request(run: Path, *, timeout: float) -> str:
    """Wait for the checkpoint, and return its path. Raises InputError if the run is not training, SaveError if it could not save."""
    run_directory = RunDirectory(resume_config(run).absolute().parent)
    if not run_directory.is_locked:
        raise InputError(f"{run}: expected a run that is training, got one that is not. Resume it: manta resume {run_directory.quoted}.")
    backend, request_file = run_directory.open_checkpoints(), run_directory.save_request_file
    before = set(backend.names())
    request_file.touch()
    deadline = time.monotonic() + timeout
    while request_file.exists():
        if not run_directory.is_locked:
            request_file.unlink(missing_ok=True)
            break  # it has ended, and saved at its end
        if time.monotonic() > deadline:
            request_file.unlink(missing_ok=True)
            raise SaveError(f"{run_directory.path}: expected a checkpoint within {timeout:.0f} s, got none. Raise --timeout.")
        time.sleep(POLL)
    after = backend.names()
    if not after or after[0] in before:
        raise SaveError(f"{run_directory.path}: could not save. See {run_directory.path / 'logs'}.")
    return backend.location(after[0])
