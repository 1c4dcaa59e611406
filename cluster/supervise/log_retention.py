"""Delete the logs of old attempts."""

import shutil
from pathlib import Path


def delete_expired_logs(logs: Path, *, attempt: int, keep: int) -> None:
    """Keep the `keep` newest attempts, of which `attempt` is the last. A log that cannot be deleted is skipped."""
    for log in logs.glob("attempt-*"):
        number = log.name.removeprefix("attempt-")
        if number.isdecimal() and int(number) <= attempt - keep:
            shutil.rmtree(log, ignore_errors=True)
