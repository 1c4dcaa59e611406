"""`manta logs`: what one rank has written, in one attempt, or from there on."""

import re
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from manta.cluster.supervise.event_log import read_events
from manta.data.errors import InputError
from manta.launch.config import resume_config
from manta.launch.control.tail import Tail
from manta.trainer.run_directory import RunDirectory

LOOK = 0.2  # seconds


def logs(run: Path, *, rank: int, attempt: int | None, follow: bool) -> Iterator[bytes]:
    """The log, of the newest attempt where none is named. `follow`: and what is added, attempt after attempt, until the run has ended.

    Raises InputError where there is no such log.
    """
    home = RunDirectory(resume_config(run).absolute().parent)
    while follow and home.is_locked and _may_come(home, rank, attempt):
        time.sleep(LOOK)
    number = _asked(home, rank, attempt)
    tail = Tail(_written(home)[number][rank])
    while True:
        ended = not (follow and home.is_locked)  # asked before the reading, so that the last words are read
        after = [later for later, ranks in sorted(_written(home).items()) if later > number and rank in ranks]
        yield tail.new()
        if follow and after:
            number = after[0]
            tail = Tail(_written(home)[number][rank])
        elif ended:
            return
        else:
            time.sleep(LOOK)


def _may_come(home: RunDirectory, rank: int, attempt: int | None) -> bool:
    """Whether that log is not there, and is still to be begun: ranks take theirs one by one, when they have everything imported."""
    written = _written(home)
    if not written:
        return True
    number = max(written) if attempt is None else attempt
    if number not in written or rank in written[number]:
        return False
    started = [event for event in read_events(home.events_file) if (event["event"], event["attempt"]) == ("attempt-started", number)]
    return not started or rank < len(started[-1]["ranks"])


def _asked(home: RunDirectory, rank: int, attempt: int | None) -> int:
    written = _written(home)
    if not written:
        raise InputError(f"{home.path}: got no rank's log yet, wants a run that has started; how it stands: manta status {home.quoted}")
    number = max(written) if attempt is None else attempt
    if number not in written:
        raise InputError(f"--attempt: got {number}, wants one whose logs are kept: {_in_words(written)}")
    if rank not in written[number]:
        raise InputError(f"--rank: got {rank}, wants one that attempt {number} had: {_in_words(written[number])}")
    return number


def _written(home: RunDirectory) -> dict[int, dict[int, Path]]:
    """The logs there are: attempt -> rank -> file."""
    found: dict[int, dict[int, Path]] = {}
    for path in home.logs.glob("attempt-*/rank-*.log"):
        if numbers := re.fullmatch(r"attempt-(\d+)/rank-(\d+)\.log", f"{path.parent.name}/{path.name}"):
            found.setdefault(int(numbers[1]), {})[int(numbers[2])] = path
    return found


def _in_words(numbers: Collection[int]) -> str:
    """0, 1, 2, 3 and 7 -> 0 to 3, 7."""
    ordered = sorted(numbers)
    starts = [n for n in ordered if n - 1 not in numbers]
    ends = [n for n in ordered if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))
