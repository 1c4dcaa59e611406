"""The heartbeat and error files, by which a rank reports to its supervisor."""

import json
import time

from hypothesis import given
from hypothesis import strategies as st

from manta.cluster.protocol import HEARTBEAT_SIZE, HeartbeatReader, HeartbeatWriter, RankError, read_error, write_error


def heartbeat(step, phase="step", **more):
    return json.dumps({"step": step, "phase": phase, "time": 1.5, **more}).encode().ljust(HEARTBEAT_SIZE)


@given(st.integers(0, HEARTBEAT_SIZE))
def test_a_torn_heartbeat_is_ignored(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("heartbeats") / "heartbeat"
    reader = HeartbeatReader(path)
    assert reader.read().phase == ""
    path.write_bytes(heartbeat(9, "load"))
    assert reader.read().step == 9
    path.write_bytes(heartbeat(10, "step")[:cut])
    assert (reader.read().step, reader.read().phase) in {(9, "load"), (10, "step")}


def test_a_resumed_rank_has_stepped_after_its_own_first_step(tmp_path):
    path = tmp_path / "heartbeat"
    reader = HeartbeatReader(path)
    writer = HeartbeatWriter(str(path))
    assert not reader.read().has_stepped
    for step, phase, has_stepped in [(0, "start", False), (0, "load", False), (40, "read", False), (40, "step", False), (41, "step", True)]:
        writer(phase, step)
        assert reader.read().has_stepped is has_stepped
    assert reader.read().resumed_from == 40


def test_a_reader_that_missed_the_first_steps_knows_where_the_rank_resumed(tmp_path):
    """With fast steps, many pass between two reads."""
    path = tmp_path / "heartbeat"
    writer = HeartbeatWriter(str(path))
    for step in range(40, 45):
        writer("step", step)
    heartbeat = HeartbeatReader(path).read()
    assert (heartbeat.resumed_from, heartbeat.step, heartbeat.has_stepped) == (40, 44, True)


def test_a_rank_that_had_no_step_to_do_has_stepped(tmp_path):
    writer = HeartbeatWriter(str(tmp_path / "heartbeat"))
    writer("save", 40)
    assert not HeartbeatReader(tmp_path / "heartbeat").read().has_stepped
    writer("done", 40)
    assert HeartbeatReader(tmp_path / "heartbeat").read().has_stepped


def test_silent_seconds_count_since_the_heartbeat_changed(tmp_path):
    path = tmp_path / "heartbeat"
    reader = HeartbeatReader(path)
    path.write_bytes(heartbeat(1))
    reader.read()
    time.sleep(0.05)
    path.write_bytes(heartbeat(1))
    reader.read()
    assert reader.silent_seconds >= 0.05
    path.write_bytes(heartbeat(2))
    reader.read()
    assert reader.silent_seconds < 0.05


def test_work_is_optional_and_the_file_keeps_its_size(tmp_path):
    path = tmp_path / "heartbeat"
    reader = HeartbeatReader(path)
    path.write_bytes(heartbeat(1))
    assert reader.read().work == 0
    path.write_bytes(heartbeat(2, work=0.25))
    assert reader.read().work == 0.25
    writer = HeartbeatWriter(str(path))
    writer.work = 123456.123456789
    writer("evaluate", 10**12)
    assert path.stat().st_size == HEARTBEAT_SIZE
    assert (reader.read().work, reader.read().step) == (123456.123457, 10**12)


def test_intervals_are_measured_between_steps_but_not_the_first(tmp_path):
    path = tmp_path / "heartbeat"
    reader = HeartbeatReader(path)
    written = [(3, "load"), (3, "step"), (4, "step"), (5, "step"), (5, "save"), (5, "step"), (5, "read"), (5, "step"), (6, "step")]
    for step, phase in written:
        time.sleep(0.1 if (step, phase) != (5, "step") else 0.02)
        path.write_bytes(heartbeat(step, phase, resumed_from=3))
        reader.read()
    assert reader.intervals == 2  # to 5, and to 6
    assert 0.1 <= reader.longest < 1.0


def test_an_error_is_read_as_written_and_a_torn_one_is_none(tmp_path):
    path = tmp_path / "rank.error.json"
    assert read_error(path) is None
    error = RankError(type="ValueError", message="bad", traceback="trace", step=3, phase="save", category="unrecoverable")
    write_error(path, error)
    assert read_error(path) == error
    path.write_bytes(path.read_bytes()[:20])
    assert read_error(path) is None
