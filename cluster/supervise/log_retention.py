"""Delete the logs of old attempts."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path


def expired_logs(names: Iterable[str], *, attempt: int, keep: int) -> list[str]:
    """Return those of the names in `logs/` that are older than the `keep` newest attempts, of which `attempt` is the last."""
    numbers = {name: int(match[1]) for name in names if (match := re.fullmatch(r"attempt-(\d{4,})", name))}
    return sorted(name for name, number in numbers.items() if number <= attempt - max(1, keep))


def delete_expired_logs(logs: Path, *, attempt: int, keep: int) -> None:
    """Skips a log that can not be deleted: the next attempt tries again."""
    if logs.is_dir():
        for name in expired_logs((entry.name for entry in logs.iterdir()), attempt=attempt, keep=keep):
            shutil.rmtree(logs / name, ignore_errors=True)
