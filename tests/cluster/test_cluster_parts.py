"""The small parts: heartbeat, journal, orders, config, the machine, and what we hold of Ray that is not public."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.cluster.config import ClusterConfig
from manta.cluster.job import Job
from manta.cluster.nodes import oom_kills
from manta.cluster.nodes.agent import NodeFacts
from manta.cluster.nodes.machine import default_ranks, gpus, island_in
from manta.cluster.nodes.placement import Machine, Place, PlacementError, place
from manta.cluster.protocol import HEARTBEAT_SIZE, HeartbeatReader, HeartbeatWriter
from manta.cluster.supervise.attempt import differences, places, unfit
from manta.cluster.supervise.event_log import Event, Journal, read_events
from manta.cluster.supervise.log_retention import outlived
from manta.cluster.supervise.requests import Orders
from manta.cluster.supervise.run_state import advance, replay


def beat(step, phase="step", **told):
    return json.dumps({"step": step, "phase": phase, "time": 1.5, **told}).encode().ljust(HEARTBEAT_SIZE)


@given(st.integers(0, HEARTBEAT_SIZE))
def test_a_torn_beat_leaves_the_last_good_one(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("beats") / "beat"
    reader = HeartbeatReader(path)
    assert reader.read().phase == ""
    path.write_bytes(beat(9, "load"))
    assert reader.read().step == 9
    path.write_bytes(beat(10, "step")[:cut])
    assert (reader.read().step, reader.read().phase) in {(9, "load"), (10, "step")}


def test_a_rank_has_stepped_when_it_got_further_than_where_it_began(tmp_path):
    path = tmp_path / "beat"
    reader = HeartbeatReader(path)
    for step, phase, has_stepped in [(0, "start", False), (40, "load", False), (40, "step", False), (41, "step", True), (41, "save", True)]:
        path.write_bytes(beat(step, phase))
        reader.read()
        assert reader.has_stepped is has_stepped


def test_quiet_is_the_time_since_the_beat_changed(tmp_path):
    path = tmp_path / "beat"
    reader = HeartbeatReader(path)
    path.write_bytes(beat(1))
    reader.read()
    time.sleep(0.05)
    path.write_bytes(beat(1))
    reader.read()
    assert reader.quiet >= 0.05
    path.write_bytes(beat(2))
    reader.read()
    assert reader.quiet < 0.05


def test_a_beat_may_tell_of_work_and_an_older_one_does_not(tmp_path):
    path = tmp_path / "beat"
    reader = HeartbeatReader(path)
    path.write_bytes(beat(1))
    assert reader.read().work == 0
    path.write_bytes(beat(2, work=0.25))
    assert reader.read().work == 0.25
    rank = HeartbeatWriter(str(path))
    rank.work = 123456.123456789
    rank("evaluate", 10**12)
    assert path.stat().st_size == HEARTBEAT_SIZE
    assert (reader.read().work, reader.read().step) == (123456.123457, 10**12)


def test_silences_are_measured_between_beats_of_steps_and_the_first_step_s_is_left_out(tmp_path):
    path = tmp_path / "beat"
    reader = HeartbeatReader(path)
    told = [(3, "load"), (3, "step"), (4, "step"), (5, "step"), (5, "save"), (5, "step"), (5, "read"), (5, "step"), (6, "step")]
    for step, phase in told:
        time.sleep(0.1 if (step, phase) != (5, "step") else 0.02)
        path.write_bytes(beat(step, phase))
        reader.read()
    assert reader.intervals == 2  # to 5, and to 6
    assert 0.1 <= reader.longest < 1.0


def test_a_journal_goes_on_after_a_torn_line(tmp_path):
    path = tmp_path / "events.jsonl"
    with Journal(path) as journal:
        assert journal.last_attempt == 0
        journal.write(Event(kind="attempt-started", attempt=3, time=1.0, details={"ranks": []}))
    with path.open("ab") as file:
        file.write(b'{"time": 2.0, "event": "attempt-stopped", "attempt": 3, "ranks": [{}')
    assert [event["event"] for event in read_events(path)] == ["attempt-started"], "a line that is being written is not told yet"
    with Journal(path) as journal:
        assert journal.last_attempt == 3
        journal.write(Event(kind="run-started", attempt=0, time=3.0))
    first, last = read_events(path)
    assert first == {"time": 1.0, "event": "attempt-started", "attempt": 3, "ranks": []}
    assert last["event"] == "run-started"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_orders_are_noted_and_old_handlers_put_back(number):
    before = signal.getsignal(number)
    with Orders() as orders:
        assert orders.leave is None
        os.kill(os.getpid(), number)
        assert (orders.leave, orders.at_once) == (number, False)
        os.kill(os.getpid(), signal.SIGINT)
        assert (orders.leave, orders.at_once) == (number, True)
    assert signal.getsignal(number) is before


def test_a_file_asks_as_a_signal_does_and_is_taken_away(tmp_path):
    file = tmp_path / "stop-now"
    file.write_text("at once")  # of a run that was killed before it could answer
    with Orders(file) as orders:
        assert (orders.leave, orders.at_once) == (None, False)
        file.touch()
        assert (orders.leave, orders.at_once) == (signal.SIGTERM, False)
        file.write_text("at once")
        assert orders.at_once
        file.unlink()
        assert (orders.leave, orders.at_once) == (signal.SIGTERM, True), "what was said is said"
        file.touch()
    assert not file.exists()


def test_a_file_does_not_change_what_a_signal_said(tmp_path):
    with Orders(tmp_path / "stop-now") as orders:
        os.kill(os.getpid(), signal.SIGINT)
        (tmp_path / "stop-now").touch()
        assert (orders.leave, orders.at_once) == (signal.SIGINT, False)


def test_the_clock_asks_as_usr1_does_once_this_process_is_so_old():
    old = time.time() - psutil.Process().create_time()
    with Orders(seconds=old + 60) as later, Orders(seconds=old - 0.1) as due:
        assert (later.leave, due.leave) == (None, signal.SIGUSR1)


@pytest.mark.parametrize(("text", "seconds"), [("3:50:00", 13_800), ("0:00:15", 15), ("2-01:00:00", 176_400), (None, math.inf)])
def test_a_time_to_stop_after_is_hours_minutes_and_seconds(text, seconds):
    assert ClusterConfig(stop_after=text).stop_after_seconds == seconds
    for bad in ("90", "1:75:00", "10:00", "soon"):
        with pytest.raises(pydantic.ValidationError, match="hours:minutes:seconds"):
            ClusterConfig(stop_after=bad)


@given(st.sets(st.integers(0, 12000)), st.integers(1, 12000), st.integers(1, 30))
def test_the_logs_of_the_newest_attempts_are_kept(numbers, attempt, keep):
    names = [f"attempt-{number:04d}" for number in numbers]
    gone = outlived([*names, "controller.log", "attempt-0001.old", "attempts"], attempt=attempt, keep=keep)
    left = {number for number in numbers if f"attempt-{number:04d}" not in gone}
    assert set(gone) <= set(names)
    assert left == {number for number in numbers if number > attempt - keep}
    assert len(left - {attempt}) < keep or max(left) > attempt


def test_every_setting_is_explained_and_bad_ones_are_refused():
    assert all(field.description for field in ClusterConfig.model_fields.values())
    for nodes in (0, "8..2", "two", "2..", -1, 1.5):
        with pytest.raises(pydantic.ValidationError, match="nodes"):
            ClusterConfig.model_validate({"nodes": nodes})
    with pytest.raises(pydantic.ValidationError, match="step_timeout"):
        ClusterConfig.model_validate({"step_timeout": float("nan")})


def test_ranks_are_numbered_along_the_nodes(tmp_path):
    job = Job(
        program=("x",),
        environment={"NCCL_SOCKET_IFNAME": "mine"},
        directory=tmp_path,
        sizes=(4, 5),
        environment_by_ranks={4: {"SIZE": "four"}, 5: {"SIZE": "five"}},
    )
    facts = [NodeFacts(host=f"h{n}", address=f"10.0.0.{n}", interface=f"eth{n}") for n in range(3)]
    on = [Place(Machine(id=f"{n}", host=f"h{n}", address=f"10.0.0.{n}", port=1, cpus=2), ranks) for n, ranks in enumerate((2, 2, 1))]
    by_node = places(job, 7, on, facts, 1234)
    assert [[place["RANK"] for place in node] for node in by_node] == [["0", "1"], ["2", "3"], ["4"]]
    assert [[place["LOCAL_RANK"] for place in node] for node in by_node] == [["0", "1"], ["0", "1"], ["0"]]
    assert {place["MASTER_ADDR"] for node in by_node for place in node} == {"10.0.0.0"}
    assert {place["SIZE"] for node in by_node for place in node} == {"five"}
    assert by_node[2][0]["LOCAL_WORLD_SIZE"] == "1"
    assert by_node[1][0]["GLOO_SOCKET_IFNAME"] == "eth1"
    assert by_node[1][0]["NCCL_SOCKET_IFNAME"] == "mine"


def test_gpus_that_are_hidden_do_not_count(monkeypatch):
    for visible, count in [("", 0), ("-1", 0), ("0,1", 2), ("GPU-4f2c", 1)]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus() == count
        assert default_ranks() == (count or min(2, len(os.sched_getaffinity(0))))


def test_ray_is_imported_only_by_a_run():
    code = "import sys, manta.cluster.config, manta.cluster.supervise.controller; sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_what_we_hold_of_ray_that_is_not_public_is_there():
    """runtime.py and nodes.py touch these and nothing else that is private."""
    code = """
from ray._private import node, ray_constants, services, worker
from ray._private.state import state
import subprocess
assert issubclass(services.ConsolePopen, subprocess.Popen)
assert worker._worker_logs_enabled is True
assert services.resolve_ip_for_localhost("127.0.0.2") == "127.0.0.2"
assert all(callable(getattr(node.Node, name)) for name in ("start_monitor", "start_log_monitor", "start_api_server"))
assert callable(state.get_draining_nodes)
assert worker._global_node is None
assert "gcs_server" == ray_constants.PROCESS_TYPE_GCS_SERVER
"""
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_a_signal_that_the_parent_told_us_to_ignore_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Orders() as orders:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert orders.leave is signal.SIGUSR1
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_node_that_has_another_directory_or_another_manta_is_unfit_and_other_versions_are_told(tmp_path):
    job = Job(program=("x",), environment={}, directory=tmp_path, sizes=(1,), packages=(("manta", "1.0"), ("torch", "2.13")))
    job.seal.write_text("a word")
    same = {"host": "h", "address": "10.0.0.1", "interface": "eth0", "seal": "a word"}
    fit = NodeFacts(**same, versions={"manta": "1.0", "torch": "2.12"})
    assert unfit(job, fit) is None
    assert differences(job, fit) == ["torch 2.12 for 2.13"]
    assert "does not see it, wants a directory that all nodes share" in unfit(job, replace(fit, seal="another"))
    assert "got manta None, wants 1.0" in unfit(job, replace(fit, versions={"torch": "2.13"}))


def test_a_controller_reads_from_the_journal_how_the_run_stands(tmp_path):
    """One that is killed leaves its failures and suspects to the next; a run that ended leaves nothing."""
    told = [
        ("run-started", 0, {}),
        ("nodes-gathered", 0, {"ranks": 2, "nodes": []}),
        ("attempt-started", 1, {"ranks": []}),
        ("node-lost", 1, {"node": 1, "message": "gone", "machine": "m1", "suspect": True, "trusted_again": 60.0}),
        ("attempt-stopped", 1, {"outcome": "failure"}),
        ("decided", 1, {"decision": "restart", "after": 0, "leave_out": ["m2"]}),
        ("nodes-gathered", 1, {"ranks": 1, "nodes": []}),
        ("attempt-started", 2, {"ranks": []}),
        ("rank-failed", 2, {"rank": 0, "cause": "SIGNAL", "message": "killed", "step": 7, "machine": "m0"}),
    ]
    with Journal(tmp_path / "events") as journal:
        for kind, attempt, details in told:
            journal.write(Event(kind=kind, attempt=attempt, time=0.0, details=details))
    state = replay(read_events(tmp_path / "events"))
    assert (state.phase, state.attempt, state.step, state.suspects) == ("running", 2, 7, {"m1": 60.0, "m2": math.inf})
    assert [failure.cause.name for failure in state.history] == ["NODE_LOST", "SIGNAL"]
    after = advance(state, Event(kind="run-started", attempt=2, time=0.0))
    assert (after.phase, after.history, after.suspects, after.has_begun) == ("gathering", state.history, state.suspects, True)
    with pytest.raises(ValueError, match="first-step in phase gathering, wants one of running"):
        advance(after, Event(kind="first-step", attempt=2, time=0.0))
    ended = advance(after, Event(kind="run-ended", attempt=2, time=0.0))
    anew = advance(ended, Event(kind="run-started", attempt=2, time=0.0))
    assert (anew.attempt, anew.history, anew.suspects, anew.has_begun) == (2, (), {}, False)


def test_a_node_that_was_lost_before_is_not_trusted_a_third_time():
    lost = {"event": "node-lost", "attempt": 1, "time": 0.0, "node": 1, "message": "gone", "machine": "m1", "suspect": True}
    assert replay([{**lost, "trusted_again": 60.0}]).suspects == {"m1": 60.0}
    assert replay([{**lost, "trusted_again": 60.0}, {**lost, "trusted_again": None}]).suspects == {"m1": math.inf}


def test_a_node_whose_loss_was_announced_costs_no_try():
    details = {"node": 1, "message": "gone", "machine": "m1", "suspect": True, "announced": True}
    state = replay([{"event": "node-lost", "attempt": 1, "time": 0.0, **details}])
    assert [failure.cause.name for failure in state.history] == ["PREEMPTED"]


def test_what_the_kernel_killed_for_want_of_memory_is_counted_where_it_counts(tmp_path, monkeypatch):
    groups = "4:cpu:/a\n3:memory:/a/b\n0::/a/b\n"
    monkeypatch.setattr(oom_kills, "GROUPS", tmp_path)
    assert oom_kills.places(groups)[0] == tmp_path / "memory/a/b/memory.oom_control"
    assert oom_kills.places("0::/a/b\n") == [tmp_path / "a/b/memory.events", tmp_path / "memory.events"]
    assert oom_kills.kills() == 0, "nobody counts"
    for there in (*oom_kills.places(groups), *oom_kills.places(Path("/proc/self/cgroup").read_text())):
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text("low 0\noom 3\noom_kill 2\n")
    assert oom_kills.kills() == 2


def test_a_journal_of_an_older_manta_is_read():
    kinds = ("run-started", "node-ready", "attempt-started", "first-step", "attempt-stopped", "run-ended")
    state = replay({"event": kind, "attempt": int(number > 0), "time": 0.0} for number, kind in enumerate(kinds))
    assert (state.phase, state.attempt) == ("ended", 1)


def machine(number, *, gpus=0, island="", cpus=8):
    return Machine(id=f"m{number}", host=f"h{number}", address=f"10.0.0.{number}", port=1, cpus=cpus, gpus=gpus, island=island)


def test_ranks_lie_on_whole_nodes_with_neighbours_next_to_each_other():
    there = [machine(10, gpus=8), machine(9, gpus=8, island="b"), machine(2, gpus=8), machine(3, gpus=8, island="b"), machine(1)]
    found = place(there, most=4, sizes=(8, 16, 32), ranks_per_node=None)
    assert [(p.machine.id, p.ranks) for p in found.places] == [("m2", 8), ("m10", 8), ("m3", 8), ("m9", 8)], "1 has no GPU"
    assert [p.machine.id for p in place(there, most=3, sizes=(8, 16), ranks_per_node=None).places] == ["m2", "m10"]
    assert [p.ranks for p in place(there, most=4, sizes=(12,), ranks_per_node=None).places] == [8, 4]
    assert place(there, most=1, sizes=(16,), ranks_per_node=None) is None
    mixed = [machine(1, gpus=8), machine(2, gpus=4)]
    with pytest.raises(PlacementError, match="nodes differ in GPUs"):
        place(mixed, most=2, sizes=(8,), ranks_per_node=None)
    assert place(mixed, most=2, sizes=(4, 8), ranks_per_node=4).ranks == 8
    assert [p.machine.id for p in place(mixed, most=2, sizes=(4, 8), ranks_per_node=8).places] == ["m1"]


def test_an_nvlink_island_is_read_from_what_the_driver_reports():
    report = "    Fabric\n        State : Completed\n        CliqueId                          : 7\n        ClusterUUID"
    assert island_in(f"{report}                       : 50000000-0000-0000-0000-000000000003\n") == "50000000-0000-0000-0000-000000000003-7"
    assert island_in(f"{report}                       : 00000000-0000-0000-0000-000000000000\n") == ""
    assert island_in("no such thing") == ""
