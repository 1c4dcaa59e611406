"""Stop requests: by signal, file and time limit, and how a run with fake ranks acts on them.

Runs start together, and each is then stopped in its own way.
"""

import os
import signal
import time
from contextlib import contextmanager

import psutil
import pytest
from fake_run import FakeRun

from manta.cluster.supervise.requests import StopRequests

ENDLESS = {"steps": 100_000}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_are_recorded_and_old_handlers_restored(number):
    before = signal.getsignal(number)
    with StopRequests() as requests:
        assert requests.stop_signal is None
        os.kill(os.getpid(), number)
        assert (requests.stop_signal, requests.at_once) == (number, False)
        os.kill(os.getpid(), signal.SIGINT)
        assert (requests.stop_signal, requests.at_once) == (number, True)
    assert signal.getsignal(number) is before


def test_a_stop_file_counts_as_a_signal_and_is_removed(tmp_path):
    file = tmp_path / "stop-now"
    file.write_text("at once")  # of a run that was killed before it could answer
    with StopRequests(file) as requests:
        assert (requests.stop_signal, requests.at_once) == (None, False)
        file.touch()
        assert (requests.stop_signal, requests.at_once) == (signal.SIGTERM, False)
        file.write_text("at once")
        assert requests.at_once
        file.unlink()
        assert (requests.stop_signal, requests.at_once) == (signal.SIGTERM, True), "a request can not be withdrawn"
        file.touch()
    assert not file.exists()


def test_a_stop_file_does_not_replace_an_earlier_signal(tmp_path):
    with StopRequests(tmp_path / "stop-now") as requests:
        os.kill(os.getpid(), signal.SIGINT)
        (tmp_path / "stop-now").touch()
        assert (requests.stop_signal, requests.at_once) == (signal.SIGINT, False)


def test_the_time_limit_counts_from_the_start_of_the_process():
    age = time.time() - psutil.Process().create_time()
    with StopRequests(seconds=age + 60) as later, StopRequests(seconds=age - 0.1) as due:
        assert (later.stop_signal, due.stop_signal) == (None, signal.SIGUSR1)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert requests.stop_signal is signal.SIGUSR1
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def started(root, plans):
    runs = {name: FakeRun(root / name, plan, cluster={"grace_period": 0.5 if name == "slow" else 60}) for name, plan in plans.items()}
    try:
        for run in runs.values():
            run.event("first-step")
        yield runs
    finally:
        for run in runs.values():
            run.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    plans = {
        "term": {**ENDLESS, "save_time": 4},
        "interrupt": {**ENDLESS, "save_time": 0.5},
        "slow": {**ENDLESS, "save_time": 100},
        "killed": ENDLESS,
    }
    with started(tmp_path_factory.mktemp("stop"), plans) as runs:
        yield runs


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory):
    plans = {"unsaved": {**ENDLESS, "save_fails": True}, "impatient": {**ENDLESS, "save_time": 100}}
    with started(tmp_path_factory.mktemp("stop-more"), plans) as runs:
        yield runs


def test_sigterm_saves_and_exits_with_75(runs):
    runs["term"].signal(signal.SIGTERM)
    assert runs["term"].end() == 75
    assert runs["term"].event("leaving")["signal"] == "SIGTERM"
    assert not runs["term"].output()  # Ray's own handler would print a stack, and abort the controller after 3 seconds


@pytest.mark.slow
def test_a_stop_without_a_save_exits_with_143(more_runs):
    more_runs["unsaved"].signal(signal.SIGHUP)
    assert more_runs["unsaved"].end() == 143


def test_ctrl_c_saves_and_exits_with_130(runs):
    runs["interrupt"].signal(signal.SIGINT)
    assert runs["interrupt"].end() == 130
    assert all(event["outcome"] == "left" for event in runs["interrupt"].events() if event["event"] == "attempt-stopped")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_run_at_once(more_runs):
    more_runs["impatient"].signal(signal.SIGINT)
    more_runs["impatient"].event("leaving")
    more_runs["impatient"].signal(signal.SIGINT)
    assert more_runs["impatient"].end(within=8) == 130


def test_ranks_are_killed_when_the_grace_period_ends(runs):
    runs["slow"].signal(signal.SIGUSR1)
    assert runs["slow"].end(within=8) == 143


def test_no_rank_outlives_a_killed_controller_and_attempts_continue(runs):
    run = runs["killed"]
    run.process.kill()
    deadline = time.monotonic() + 5
    while (left := [c for c in run.processes().values() if "fake_rank" in c or "NodeAgent" in c]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    again = FakeRun(run.directory, {"steps": 3})
    assert again.event("attempt-started", 2)
    assert again.process.wait(30) == 0
    assert run.log(2, 1)
    assert run.process.wait() == -signal.SIGKILL
