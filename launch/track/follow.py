"""Follow metrics.jsonl and events.jsonl. Each tracker has a thread: one that hangs or fails holds up no other, and none touches the run."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from threading import Thread
from typing import Any, Protocol

from manta.cluster.supervise.event_log import parse_event
from manta.cluster.tail import Tail
from manta.data.errors import one_line, printable
from manta.launch.track.figures import Figures
from manta.trainer.metrics import Line, parse_line
from manta.trainer.run_directory import RunDirectory
from manta.trainer.serve.texts import GeneratedText, read_texts

POLL_INTERVAL = 1.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds until a tracker that failed is started again; the pause doubles each time
NOT_MEASURED = frozenset({"time", "step", "data/digest"})  # keys of a metrics line that are no measurements
log = logging.getLogger(__name__)

Event = dict[str, Any]


class Tracker(Protocol):
    """What a tracker does with a run. It is given all lines and events from the first; position and files are its own concern."""

    place: str
    """Where it writes, for the user."""

    def write(self, lines: Sequence[Line], events: Sequence[Event]) -> None:
        """Take new lines and events. A step that comes again replaces all from it on: the run resumed from a checkpoint before it."""
        ...

    def measure(self, figures: Mapping[str, float]) -> None:
        """Take figures of the run as a whole, as of the newest line."""
        ...

    def show(self, texts: Sequence[GeneratedText]) -> None:
        """Take the texts of samples.jsonl, once the run has ended."""
        ...

    def close(self) -> None: ...


def track(run_dir: RunDirectory, trackers: Mapping[str, Callable[[], Tracker]], ended: threading.Event) -> dict[str, str]:
    """Run the trackers until the run has ended, and all is written. Returns, by name, the errors of those that failed.

    ended: set by another thread if the run has ended; it has also ended if no process holds its lock.
    """
    failed, figures = dict[str, str](), Figures(run_dir)
    shared = {"figures": figures, "ended": ended, "failed": failed}
    threads = [Thread(target=_keep, args=(name, make, run_dir), kwargs=shared, daemon=True) for name, make in trackers.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def follow(run_dir: RunDirectory, ended: threading.Event) -> Iterator[tuple[Sequence[Line], Sequence[Event]]]:
    """Yield new lines and new events until the run has ended, or its directory is gone. Damaged lines are skipped."""
    events, metrics = Tail(run_dir.events_file), Tail(run_dir.metrics_file)
    while True:
        has_ended = _has_ended(run_dir, ended)  # checked before reading, so that the last lines are read
        if new := events.lines(parse_event):
            yield (), new
        for batch in metrics.batches(parse_line):
            yield batch, ()
        if has_ended:
            return
        ended.wait(POLL_INTERVAL)


def scalars(line: Line) -> dict[str, float]:
    """Return the measurements of a line by key; those of nested keys as `seconds/step`."""
    nested = {f"{key}/{name}": value for key, group in line.items() if isinstance(group, dict) for name, value in group.items()}
    measured = {key: value for key, value in line.items() if key not in NOT_MEASURED} | nested
    return {key: float(value) for key, value in measured.items() if isinstance(value, float) or (isinstance(value, int) and value < 2**63)}


def _keep(
    name: str, make: Callable[[], Tracker], run_dir: RunDirectory, *, figures: Figures, ended: threading.Event, failed: dict[str, str]
) -> None:
    """Run one tracker. If it fails, start it again after a pause; once the run has ended, give up instead."""
    pause = FIRST_PAUSE
    while True:
        try:
            with closing(make()) as tracker:
                log.info("%s: %s", name, tracker.place)
                measured: Mapping[str, float] = {}
                for lines, events in follow(run_dir, ended):
                    tracker.write(lines, events)
                    if lines and (newest := figures.newest(has_ended=False)) is not measured:
                        tracker.measure(measured := newest)
                if final := figures.newest(has_ended=True):
                    tracker.measure(final)
                if texts := read_texts(run_dir.samples_file):
                    tracker.show(texts)
        except Exception as error:  # noqa: BLE001  whatever a tracker's library raises
            problem = printable(f"{name}: {type(error).__name__}: {one_line(error)}")
        else:
            return
        if _has_ended(run_dir, ended):
            failed[name] = problem
            return
        log.warning("%s. It is started again in %g s", problem, pause)
        ended.wait(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _has_ended(run_dir: RunDirectory, ended: threading.Event) -> bool:
    try:
        return ended.is_set() or not run_dir.is_locked
    except OSError:  # its disk is away for a moment
        return False
