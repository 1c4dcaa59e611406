"""`manta logs`: what one rank has written in an attempt, or from that attempt on."""

import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

from manta.cluster.supervise.event_log import read_events
from manta.cluster.tail import Tail
from manta.data.errors import InputError
from manta.launch.config import find_run
from manta.trainer.run_directory import RunDirectory

POLL_INTERVAL = 0.2  # seconds


def logs(run: Path, *, rank: int, attempt: int | None, follow: bool) -> Iterator[bytes]:
    """Yield a rank's log. attempt: the newest if None. follow: continue with what is appended and with later attempts, until the run ends.

    Raises InputError if there is no such log.
    """
    run_dir = find_run(run)
    while follow and run_dir.is_locked and _is_expected(run_dir, rank, attempt):
        time.sleep(POLL_INTERVAL)
    found = _find_logs(run_dir)
    if not found:
        raise InputError(f"{run_dir.path}: expected a run that has started, got no rank's log. Check it: manta status {run_dir.quoted}")
    number = max(found) if attempt is None else attempt
    if number not in found:
        raise InputError(f"--attempt: expected one whose logs are kept, got {number}. Use {_ranges_text(found)}.")
    if rank not in found[number]:
        raise InputError(f"--rank: expected a rank of attempt {number}, got {rank}. Use {_ranges_text(found[number])}.")
    tail = Tail(run_dir.log(number, rank))
    while True:
        has_ended = not (follow and run_dir.is_locked)  # checked before reading, so that the last lines are read
        later = [other for other, ranks in _find_logs(run_dir).items() if other > number and rank in ranks]
        while text := tail.new():
            yield text
        if follow and later:
            number = min(later)
            tail = Tail(run_dir.log(number, rank))
        elif has_ended:
            return
        else:
            time.sleep(POLL_INTERVAL)


def _is_expected(run_dir: RunDirectory, rank: int, attempt: int | None) -> bool:
    """Whether the log does not exist yet, but will: ranks open theirs one by one, after their imports."""
    found = _find_logs(run_dir)
    if not found:
        return True
    number = attempt or max(found)
    if rank in found.get(number, {rank}):
        return False
    started = [event for event in read_events(run_dir.events_file) if (event["event"], event["attempt"]) == ("attempt-started", number)]
    return not started or rank < len(started[-1]["ranks"])


def _find_logs(run_dir: RunDirectory) -> dict[int, set[int]]:
    """Return the ranks that have a log in each attempt."""
    found: defaultdict[int, set[int]] = defaultdict(set)
    for path in run_dir.logs.glob("attempt-*/rank-*.log"):
        if numbers := re.fullmatch(r"attempt-(\d+)/rank-(\d+)\.log", f"{path.parent.name}/{path.name}"):
            found[int(numbers[1])].add(int(numbers[2]))
    return found


def _ranges_text(numbers: Collection[int]) -> str:
    """Return 0, 1, 2, 3 and 7 as `0 to 3, 7`."""
    ordered = sorted(numbers)
    starts = [n for n in ordered if n - 1 not in numbers]
    ends = [n for n in ordered if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))
