"""Goodput: each second of a run is in the right category, and in one only."""

from fuzz import manta

from manta.launch.goodput import Category, goodput


class Log:
    """Writes the event log and the metrics of a run on a simulated clock."""

    def __init__(self):
        self.time, self.events, self.lines, self.seconds = 1000.0, [], [], {}

    def event(self, kind, attempt=0, *, after=0.0, **details):
        self.time += after
        self.events.append({"time": self.time, "event": kind, "attempt": attempt, **details})

    def start(self, attempt, *, step, restore=2.0):
        """Start an attempt, in 5 s and the time to restore, and do its first step in 4 s."""
        self.event("attempt-started", attempt)
        self.seconds = {"start": 3.0, "load": 1.0, "restore": restore}
        self.time += 1.0 + 4.0 + restore  # a second passes before the rank counts
        self.event("loaded", attempt, step=step)
        self.step(attempt, step + 1, compile=3.0, read=1.0)

    def step(self, attempt, number, **seconds):
        for phase, value in (seconds or {"step": 1.0, "read": 0.25}).items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
            self.time += value
        self.lines.append({"time": self.time, "step": number, "attempt": attempt, "step_time": 1.0, "seconds": self.seconds.copy()})

    def steps(self, attempt, first, last):
        for step in range(first, last + 1):
            self.step(attempt, step)


def check(log, expected, **now):
    found = goodput(log.events, log.lines, **now)
    seconds = {category: round(value, 6) for category, value in found.seconds.items() if abs(value) > 1e-6}
    assert seconds == expected
    assert abs(sum(found.seconds.values()) - found.total) < 1e-9
    return found


def started(log):
    log.event("run-started")
    log.event("waiting", after=4.0, message="1 node of 2")
    log.event("nodes-gathered", after=7.0, ranks=2, nodes=[])


def test_an_undisturbed_run():
    log = Log()
    started(log)
    log.start(1, step=0, restore=0.0)
    log.steps(1, 2, 20)
    log.step(1, 21, step=1.0, read=0.25, evaluate=3.0)
    log.step(1, 22, step=11.0, read=0.25, save=2.0)
    log.event("attempt-stopped", 1, after=1.5, outcome="done")
    log.event("run-ended", 1, after=0.5, exit_code=0)
    found = check(
        log,
        {
            Category.TRAINING: 22.0,
            Category.START: 4.0 + 5.0 + 0.5,
            Category.NODES: 7.0,
            Category.COMPILE: 2.0,
            Category.DATA: 1.0 + 21 * 0.25,
            Category.EVALUATION: 3.0,
            Category.SAVE: 2.0 + 1.5,
            Category.SLOW: 10.0,
        },
    )
    assert found.share == 22.0 / found.total


def test_a_killed_rank_costs_the_steps_after_the_checkpoint_and_the_restart():
    log = Log()
    started(log)
    log.start(1, step=0, restore=0.0)
    log.steps(1, 2, 12)
    log.event("rank-failed", 1, after=3.5, step=14, noticed_after=0.5, rank=1, cause="KILLED", message="")
    log.event("attempt-stopped", 1, after=0.25, outcome="failure")
    log.start(2, step=10)
    log.steps(2, 12, 14)
    log.event("attempt-stopped", 2, outcome="done")
    log.event("run-ended", 2, exit_code=0)
    check(
        log,
        {
            Category.TRAINING: 10.0 + 4.0,
            Category.START: 4.0 + 5.0,
            Category.NODES: 7.0,
            Category.COMPILE: 2.0 + 2.0,
            Category.DATA: 1.0 + 9 * 0.25 + 1.0 + 3 * 0.25,
            Category.RESTORE: 2.0,
            Category.RECOMPUTED: 2 * 1.25 + 2.0,
            Category.RESTART: 1.5 + 0.25 + 5.0,
        },
    )


def test_a_checkpoint_from_which_a_run_resumed_was_no_lost_work():
    log = Log()
    started(log)
    log.start(1, step=0, restore=0.0)
    log.steps(1, 2, 10)
    log.step(1, 11, step=1.0, read=0.25, save=1.5)  # of step 10
    log.event("rank-failed", 1, step=11, noticed_after=0.0, rank=1, cause="SIGNAL", message="")
    log.start(2, step=10)
    found = goodput(log.events, log.lines, now=log.time)
    assert found.seconds[Category.SAVE] == 1.5
    assert abs(found.seconds[Category.RECOMPUTED] - 1.25) < 1e-9


def test_a_stop_and_a_resume_an_hour_later():
    log = Log()
    started(log)
    log.start(1, step=0, restore=0.0)
    log.steps(1, 2, 8)
    log.event("leaving", 1, after=0.5, signal="SIGTERM")
    log.event("attempt-stopped", 1, after=1.0, outcome="left")
    log.event("run-ended", 1, after=0.25, exit_code=75)
    log.time += 3600.0
    log.event("run-started", 1)
    log.start(2, step=8)
    check(
        log,
        {
            Category.TRAINING: 8.0 + 0.5 + 10.0,
            Category.START: 4.0 + 5.0 + 0.25 + 5.0,
            Category.NODES: 7.0,
            Category.COMPILE: 2.0 + 3.0,  # the second attempt has no other step to compare with
            Category.DATA: 1.0 + 7 * 0.25 + 1.0,
            Category.SAVE: 1.0,
            Category.RESTORE: 2.0,
            Category.STOPPED: 3600.0,
        },
        now=log.time + 10.0,
    )


def test_a_controller_that_was_killed_ended_with_its_last_sign_of_life():
    log = Log()
    started(log)
    log.start(1, step=0, restore=0.0)
    log.steps(1, 2, 8)
    log.time += 100.0
    log.event("run-started", 1, took_over=True)
    log.event("run-ended", 1, after=2.0, exit_code=1)
    found = check(
        log,
        {
            Category.TRAINING: 8.0,
            Category.START: 4.0 + 5.0 + 2.0,
            Category.NODES: 7.0,
            Category.COMPILE: 2.0,
            Category.DATA: 1.0 + 7 * 0.25,
            Category.STOPPED: 100.0,
        },
    )
    assert found.total == log.time - 1000.0


def test_no_events_are_no_time():
    assert goodput([], []).share == 0.0


def test_a_finished_run_is_shown_as_a_table(workspace, finished_run):
    shown = manta("goodput", str(workspace.directory / finished_run))
    assert shown.code == 0
    first, *rows = shown.stdout.splitlines()
    assert first.startswith("goodput ")
    assert first.endswith(" since the first start")
    assert [row.split("  ")[0] for row in rows] == [category.value for category in Category]
