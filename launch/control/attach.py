"""`manta attach`: show a run as `manta train` shows it in the foreground, from its event log and metrics."""

import time
from collections.abc import Iterator
from pathlib import Path

from manta.cluster.supervise.event_log import POLL, Event, event_of, exit_code, parse_event, read_events
from manta.cluster.tail import Tail
from manta.data.errors import InputError
from manta.launch.config import find_run
from manta.launch.run.display import Display
from manta.launch.terminal import notify, resume_hint
from manta.trainer.dist.layout import shrunk_layouts
from manta.trainer.run_directory import RunDirectory

POLL_INTERVAL = 0.25  # seconds


def attach(run: Path) -> int:
    """Show the run from its last start to its end. Return its exit code, or 0 after a Ctrl-C, which the run does not notice.

    Raises InputError if the run was never started.
    """
    run_dir = find_run(run)
    try:
        while run_dir.is_locked and _has_ended(run_dir):
            time.sleep(POLL_INTERVAL)  # its controller is about to start
        if not run_dir.is_locked:
            events = read_events(run_dir.events_file)
            if not events:
                raise InputError(f"{run_dir.path}: expected a run that was started, got a new one. Start it: manta resume {run_dir.quoted}")
            code = exit_code(events)
            notify(f"{run_dir.path}: not running" + ("" if code is None else f"; it ended with exit code {code}"))
        config = run_dir.config()
        code = Display(run_dir, config, shrunk_layouts(config.train, config.parallel)).follow(_events(run_dir))
    except KeyboardInterrupt:
        notify(f"{run_dir.path}: still running; show it again: manta attach {run_dir.quoted}; stop it: manta stop {run_dir.quoted}")
        return 0
    if not _has_ended(run_dir):
        notify(f"killed; {resume_hint(run_dir)}")
    return code


def _events(run_dir: RunDirectory) -> Iterator[Event]:
    event_log, is_running = Tail(run_dir.events_file), True
    while is_running:
        is_running = run_dir.is_locked  # checked before reading, so that the last events are read
        events = [event_of(line) for line in event_log.lines(parse_event)]
        starts = [index for index, event in enumerate(events) if event.kind == "run-started"]
        for event in events[starts[-1] if starts else 0 :]:
            yield event
            if event.kind == "run-ended":
                return
        yield Event(kind=POLL, attempt=0, time=time.time())
        time.sleep(POLL_INTERVAL if is_running else 0)


def _has_ended(run_dir: RunDirectory) -> bool:
    """Whether the last start has ended, or there was none."""
    events = read_events(run_dir.events_file)
    return not events or exit_code(events) is not None
