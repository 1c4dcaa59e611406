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
    for step, phase, has_stepped in [(0, "start", False), (40, "load", False), (40, "step", False), (41, "step", True), (41, "save", True)]:
        path.write_bytes(heartbeat(step, phase))
        reader.read()
        assert reader.has_stepped is has_stepped


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
        path.write_bytes(heartbeat(step, phase))
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
