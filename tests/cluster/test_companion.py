"""The process beside the controller: however it ends or hangs, the run continues, and none is left behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from run_process import until

from manta.cluster.supervise import companion
from manta.cluster.supervise.companion import Companion

CHILD = "import subprocess, sys; subprocess.Popen(['sleep', '600'])"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(companion, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(companion, "END_TIMEOUT", 0.5)


def start(tmp_path, program: str) -> Companion:
    started = Companion(("-I", "-S", "-c", program), tmp_path)
    assert started.check() is None
    return started


def process_of(started: Companion) -> psutil.Process:
    return psutil.Process(started._process.pid)


def test_one_that_fails_is_reported_and_started_again_after_a_pause_that_grows(tmp_path):
    started, since = start(tmp_path, "import sys; print('problem', flush=True); sys.exit(3)"), time.monotonic()
    messages = []
    until(lambda: messages.extend(filter(None, [started.check()])) or len(messages) == 3, within=20)
    assert messages == ["exit code 3"] * 3
    assert started.starts == 3
    assert time.monotonic() - since > 0.05 + 0.1
    assert started.log.read_text() == "problem\n" * 3
    started.close()


def test_one_that_is_killed_is_reported_and_its_children_are_gone(tmp_path):
    started = start(tmp_path, f"{CHILD}; sys.stdin.read()")
    child = until(lambda: process_of(started).children(), within=20)[0]
    os.kill(process_of(started).pid, signal.SIGKILL)
    assert until(started.check, within=20) == "killed by SIGKILL"
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, within=5)
    started.close()


def test_a_child_in_a_session_of_its_own_is_ended_too(tmp_path):
    program = "import subprocess, sys; subprocess.Popen(['sleep', '600'], start_new_session=True); sys.stdin.read()"
    started = start(tmp_path, program)
    child = until(lambda: process_of(started).children(), within=20)[0]
    until(lambda: os.getsid(child.pid) == child.pid, within=5)
    started.close()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, within=5)


def test_one_that_is_done_is_not_started_again(tmp_path):
    started = start(tmp_path, "pass")
    until(lambda: started.check() or started._process is None, within=20)
    time.sleep(0.1)
    assert started.check() is None
    assert (started._process, started.starts) == (None, 1)


def test_its_standard_input_ends_with_the_run(tmp_path):
    started = start(tmp_path, "import sys; sys.stdin.read(); print('all written')")
    started.finish(lambda: False)
    assert started.log.read_text() == "all written\n"
    started.close()


@pytest.mark.parametrize("program", ["import time; time.sleep(600)", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"])
def test_one_that_hangs_or_is_frozen_holds_up_the_end_for_a_limited_time(tmp_path, program):
    started, since = start(tmp_path, program), time.monotonic()
    process = process_of(started)
    started.finish(lambda: False)
    started.close()
    assert 0.5 <= time.monotonic() - since < 3
    assert not process.is_running()
    hurried = start(tmp_path, program)
    since = time.monotonic()
    hurried.finish(lambda: True)
    hurried.close()
    assert time.monotonic() - since < 0.5


def test_it_dies_with_the_controller(tmp_path):
    program = "import sys, time; from pathlib import Path; from manta.cluster.supervise.companion import Companion\n"
    program += "c = Companion(('-c', 'import time; time.sleep(600)'), Path(sys.argv[1])); c.check(); print(c._process.pid, flush=True)\n"
    program += "time.sleep(600)"
    with subprocess.Popen([sys.executable, "-P", "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as controller:
        process = psutil.Process(int(controller.stdout.readline()))
        until(lambda: "die_with_parent" not in " ".join(process.cmdline()), within=20)
        controller.kill()
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, within=5)


def test_without_one_nothing_is_started(tmp_path):
    none = Companion((), tmp_path)
    assert none.check() is None
    none.finish(lambda: False)
    none.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_for_its_log_and_a_lack_of_processes_are_no_problem(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/companion.log").symlink_to("/dev/full")
    started = start(tmp_path, "import sys; print('lost'); sys.stdin.read()")
    started.finish(lambda: False)
    started.close()

    def none_left(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("subprocess.Popen", none_left)
    assert Companion(("-c", "pass"), tmp_path).check() == "Resource temporarily unavailable"
