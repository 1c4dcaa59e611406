"""The event log, and the state of a run that follows from it."""

import json
import math
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.cluster.supervise.event_log import Event, EventLog, read_events
from manta.cluster.supervise.failure import Cause, decide, failing_machines
from manta.cluster.supervise.run_state import advance, replay


def test_the_log_continues_after_a_torn_line(tmp_path):
    path = tmp_path / "events.jsonl"
    with closing(EventLog(path)) as log:
        assert replay(read_events(path)).attempt == 0
        log.write(Event(kind="attempt-started", attempt=3, time=1.0, details={"ranks": []}))
    with path.open("ab") as file:
        file.write(b'{"time": 2.0, "event": "attempt-stopped", "attempt": 3, "ranks": [{}')
    assert [event["event"] for event in read_events(path)] == ["attempt-started"], "an incomplete line is skipped"
    with closing(EventLog(path)) as log:
        assert replay(read_events(path)).attempt == 3
        log.write(Event(kind="run-started", attempt=0, time=3.0))
    first, last = read_events(path)
    assert first == {"time": 1.0, "event": "attempt-started", "attempt": 3, "ranks": []}
    assert last["event"] == "run-started"


def test_a_controller_resumes_from_the_event_log(tmp_path):
    """A killed controller leaves its failures and suspects to the next one; a run that ended leaves none."""
    written = [
        ("run-started", 0, {}),
        ("nodes-gathered", 0, {"ranks": 2, "nodes": []}),
        ("attempt-started", 1, {"ranks": []}),
        ("node-lost", 1, {"node": 1, "message": "gone", "machine": "m1", "suspect": True, "trusted_again": 60.0}),
        ("attempt-stopped", 1, {"outcome": "failure"}),
        ("decided", 1, {"decision": "restart", "after": 0, "exclude": ["m2"]}),
        ("nodes-gathered", 1, {"ranks": 1, "nodes": []}),
        ("attempt-started", 2, {"ranks": []}),
        ("rank-failed", 2, {"rank": 0, "cause": "HANG", "message": "hangs", "step": 7, "machine": "m0"}),
        ("rank-failed", 2, {"rank": 0, "cause": "SIGNAL", "message": "killed", "step": 7, "machine": "m0"}),
    ]
    with closing(EventLog(tmp_path / "events")) as log:
        for kind, attempt, details in written:
            log.write(Event(kind=kind, attempt=attempt, time=0.0, details=details))
    state = replay(read_events(tmp_path / "events"))
    assert (state.phase, state.attempt, state.step, state.suspects) == ("running", 2, 7, {"m1": 60.0, "m2": math.inf})
    assert [failure.cause.name for failure in state.history] == ["HANG", "SIGNAL"], "those since its last progress"
    after = advance(state, Event(kind="run-started", attempt=2, time=0.0))
    assert (after.phase, after.history, after.suspects, after.has_started) == ("gathering", state.history, state.suspects, True)
    with pytest.raises(ValueError, match="first-step: expected phase running, got gathering"):
        advance(after, Event(kind="first-step", attempt=2, time=0.0))
    ended = advance(after, Event(kind="run-ended", attempt=2, time=0.0))
    restarted = advance(ended, Event(kind="run-started", attempt=2, time=0.0))
    assert (restarted.attempt, restarted.history, restarted.suspects, restarted.has_started) == (2, (), {}, False)


def test_damaged_lines_are_skipped_and_the_first_is_named(tmp_path, caplog):
    path, common = tmp_path / "events.jsonl", {"time": 1.0, "attempt": 1}
    damaged = [
        {"event": "run-started"},
        {**common, "event": 5},
        {**common, "event": "run-started", "attempt": -1},
        {**common, "event": "run-started", "time": math.nan},
        {**common, "event": "run-ended"},
        {**common, "event": "run-ended", "exit_code": 77},
        {**common, "event": "rank-failed", "rank": 0, "step": 1, "cause": "BOREDOM", "message": "x"},
        {**common, "event": "rank-failed", "rank": 0, "step": 1, "cause": "SIGNAL", "message": ["x"]},
        {**common, "event": "nodes-gathered", "ranks": 2, "nodes": [5]},
        {**common, "event": "decided"},
        [],
        None,
    ]
    lines = [*(json.dumps(line) for line in damaged), "[" * 100_000, "\0" * 100, '{"attempt": ' + "9" * 5000]
    right = {**common, "event": "rank-failed", "rank": 0, "step": 1, "cause": "SIGNAL", "message": "SIGKILL", "new": {"key": 1}}
    path.write_text("\n".join([json.dumps(right), *lines, json.dumps(right), ""]))
    assert read_events(path) == [right, right]
    assert caplog.messages == [
        f"{path}:2: time: expected what the run wrote, got an error: Field required. The line is skipped, as are 14 more."
    ]
    assert len(replay(read_events(path)).history) == 2


def failed(step: int, machine: str | None) -> dict:
    """Return the event of a failed rank, or of a machine that was preempted."""
    common = {"attempt": 1, "time": 0.0, "step": step}
    if machine is None:
        return {**common, "event": "rank-failed", "rank": 0, "cause": "SIGNAL", "message": "SIGKILL"}
    return {**common, "event": "node-lost", "node": 0, "message": "", "machine": machine, "announced": True}


@given(st.lists(st.builds(failed, st.integers(0, 4), st.sampled_from([None, None, "m1", "m2"])), min_size=1, max_size=12))
def test_what_a_long_run_forgets_changes_no_decision(lines):
    whole = []
    for count in range(1, len(lines) + 1):
        kept = replay(lines[:count]).history
        whole.append(kept[-1])
        assert failing_machines(kept) == failing_machines(whole)
        assert decide(kept, max_restarts_without_progress=3) == decide(whole, max_restarts_without_progress=3)


def test_a_long_log_of_progress_leaves_a_short_history():
    lines = [failed(step, machine) for step in range(1000) for machine in (None, "m1")]
    assert len(replay(lines).history) <= 3


def test_a_machine_lost_twice_is_excluded_for_good():
    lost = {"event": "node-lost", "attempt": 1, "time": 0.0, "node": 1, "message": "gone", "machine": "m1", "suspect": True}
    assert replay([{**lost, "trusted_again": 60.0}]).suspects == {"m1": 60.0}
    assert replay([{**lost, "trusted_again": 60.0}, {**lost, "trusted_again": None}]).suspects == {"m1": math.inf}


def test_event_logs_of_earlier_versions_are_read():
    decided = {"event": "decided", "attempt": 1, "time": 0.0, "decision": "restart", "after": 0, "leave_out": ["m2"]}
    failed = {"event": "rank-failed", "attempt": 1, "time": 0.0, "rank": 0, "message": "fp16 loss scale", "step": 7, "machine": "m0"}
    state = replay([decided, {**failed, "cause": "HOPELESS"}])
    assert state.suspects == {"m2": math.inf}
    assert [failure.cause for failure in state.history] == [Cause.UNRECOVERABLE]


def test_an_announced_loss_is_a_preemption():
    details = {"node": 1, "message": "gone", "machine": "m1", "suspect": True, "announced": True}
    state = replay([{"event": "node-lost", "attempt": 1, "time": 0.0, **details}])
    assert [failure.cause.name for failure in state.history] == ["PREEMPTED"]


def test_the_event_log_of_an_older_version_is_read():
    kinds = ("run-started", "node-ready", "attempt-started", "first-step", "attempt-stopped", "run-ended")
    state = replay({"event": kind, "attempt": int(number > 0), "time": 0.0} for number, kind in enumerate(kinds))
    assert (state.phase, state.attempt) == ("ended", 1)
