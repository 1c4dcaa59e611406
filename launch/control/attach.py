"""`manta attach`: a run shown as `manta train` shows it in the foreground, from its log and its metrics."""

import time
from collections.abc import Iterator
from pathlib import Path

from manta.cluster.supervise.event_log import POLL, Event, event_of, parse_events, read_events
from manta.data.errors import InputError
from manta.launch.config import resume_config
from manta.launch.control.tail import Tail
from manta.launch.run.display import Display, say, stands
from manta.launch.run.train import follow
from manta.trainer.run_directory import RunDirectory

LOOK = 0.25  # seconds


def attach(run: Path) -> int:
    """Shows the run since it was started last, until it ends. Gives its exit code, or 0 where a Ctrl-C ended only the showing.

    Raises InputError where none was ever started.
    """
    home = RunDirectory(resume_config(run).absolute().parent)
    try:
        while home.is_locked and _ended(home):
            time.sleep(LOOK)  # its controller is about to begin
        if not home.is_locked:
            _tell_of_the_past(home)
        config = home.config()
        code = follow(_events(home), Display(home, config.train.steps, config.timeline()))
    except KeyboardInterrupt:
        say(f"{home.path}: goes on; to see it again: manta attach {home.quoted}; to stop it: manta stop {home.quoted}")
        return 0
    if not _ended(home):
        say(f"broken off; {stands(home)}")
    return code


def _events(home: RunDirectory) -> Iterator[Event]:
    log, running = Tail(home.events_file), True
    while running:
        running = home.is_locked  # asked before the reading, so that the last words are read
        new = [event_of(line) for line in parse_events(log.lines())]
        starts = [index for index, event in enumerate(new) if event.kind == "run-started"]
        for event in new[starts[-1] if starts else 0 :]:
            yield event
            if event.kind == "run-ended":
                return
        yield Event(kind=POLL, attempt=0, time=time.time())
        time.sleep(LOOK if running else 0)


def _tell_of_the_past(home: RunDirectory) -> None:
    events = read_events(home.events_file)
    if not events:
        raise InputError(f"{home.path}: got a run that was never started, wants one that was; start it: manta resume {home.quoted}")
    codes = [event["exit_code"] for event in events[-1:] if event["event"] == "run-ended"]
    say(f"{home.path}: is not running" + (f"; it ended with exit code {codes[0]}" if codes else ""))


def _ended(home: RunDirectory) -> bool:
    """Whether what was started last has come to its end; so has what never was."""
    return [event["event"] for event in read_events(home.events_file)[-1:]] in ([], ["run-ended"])
