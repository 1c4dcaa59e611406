"""The id of a run at its trackers: stored beside the run, so that a resumed one is the same run there."""

import secrets

from manta.data.storage.atomic import write_atomically
from manta.data.storage.regular_file import read_regular
from manta.trainer.run_directory import RunDirectory


def run_id(run_dir: RunDirectory) -> str:
    file = run_dir.path / "tracking-id"
    if not file.exists():
        write_atomically(file, secrets.token_hex(8).encode())
    return read_regular(file, 100).decode()
