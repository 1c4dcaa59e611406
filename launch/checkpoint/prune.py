"""`manta checkpoint prune`: delete checkpoints that are not kept, but never the newest valid one."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from manta.launch.checkpoint.list_checkpoints import select_checkpoints
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.retention import Retention, surplus, validation_loss
from manta.trainer.run_directory import RunDirectory


def prune(source: str, *, keep: int, best: int, every: int | None, bad: bool, dry_run: bool) -> Iterator[str]:
    """Yield each name once it is deleted. Raises InputError while the run is training, CheckpointError if no checkpoint is valid."""
    backend, _ = select_checkpoints(source)
    run_directory = RunDirectory(Path(source).absolute())
    with run_directory.lock() if run_directory.config_file.exists() and not dry_run else nullcontext():
        newest = catalog.newest_valid(backend)
        assert newest is not None, "there is at least one name"
        retention = Retention(newest=keep, best=best, every=every)
        names = surplus(backend.names(), newest.name, retention, partial(validation_loss, backend))
        for name in [*names, *(backend.bad() if bad else [])]:
            if not dry_run:
                backend.delete(name)
            yield name
