"""`manta checkpoint prune`: what is kept no more is deleted, never the newest valid one."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from manta.launch.checkpoint.list import found
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.catalog import Retention, surplus
from manta.trainer.run_directory import RunDirectory


def prune(where: str, *, keep: int, best: int, every: int | None, bad: bool, dry_run: bool) -> Iterator[str]:
    """Gives each name as it goes. Raises InputError while the run is running, CheckpointError where no checkpoint is valid."""
    place, _ = found(where)
    home = RunDirectory(Path(where).absolute())
    with home.lock() if home.config_file.exists() and not dry_run else nullcontext():
        newest = catalog.newest_valid(place)
        assert newest is not None, "there are names"
        name = newest.name
        retention = Retention(newest=keep, best=best, every=every)
        for one in surplus(place.names(), name, retention, lambda one: catalog.validation_loss(place, one)):
            if not dry_run:
                place.delete(one)
            yield one
        for one in place.bad() if bad else []:
            if not dry_run:
                place.delete(one)
            yield one
