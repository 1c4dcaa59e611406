"""Which logs of a run are kept: those of its newest attempts. A rank's log is one plain file, to which only that rank adds."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path


def outlived(names: Iterable[str], *, attempt: int, keep: int) -> list[str]:
    """Of the names in `logs/` those of attempts that are not among the `keep` newest, as `attempt` begins. Never its own."""
    numbered = {name: int(found[1]) for name in names if (found := re.fullmatch(r"attempt-(\d{4,})", name))}
    return sorted(name for name, number in numbered.items() if number <= attempt - max(1, keep))


def forget(logs: Path, *, attempt: int, keep: int) -> None:
    """A log that can not be deleted is no reason to end a run: the next attempt tries again."""
    if logs.is_dir():
        for name in outlived((entry.name for entry in logs.iterdir()), attempt=attempt, keep=keep):
            shutil.rmtree(logs / name, ignore_errors=True)
