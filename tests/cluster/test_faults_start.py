"""Faults before the first step: a port that another process takes, a peer that never joins."""

import os
import signal
from pathlib import Path

import pytest
from run_process import RunProcess, exact_values

pytestmark = pytest.mark.slow
SETTINGS = ("train.steps=20", "cluster.hot_standby=true")
THIEF = '''
import os
import socket
import sys
import threading
import time


def take():
    """Take rank 0's port as soon as it is known, in the first attempt."""
    while "MASTER_PORT" not in os.environ:
        time.sleep(0.0005)
    if (os.environ["RANK"], os.environ["MANTA_ATTEMPT"]) == ("0", "1"):
        thief.bind((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        thief.listen()


if "manta.trainer" in sys.orig_argv:
    thief = socket.socket()
    threading.Thread(target=take, daemon=True).start()
'''


@pytest.fixture(scope="module")
def reference(workspace) -> list[list]:
    with RunProcess(workspace, "start reference", *SETTINGS) as run:
        assert run.end()[0] == 0
        return exact_values(run.lines())


def test_the_next_attempt_asks_for_another_port(workspace, reference, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(THIEF)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with RunProcess(workspace, "robbed", *SETTINGS, PYTHONPATH=path) as run:
        code, output = run.end()
        assert code == 0, output
        (failed,) = run.events("rank-failed")
        assert (failed["attempt"], failed["rank"], failed["step"]) == (1, 0, 0)
        assert "a free port there" in failed["message"]
        assert failed["message"].endswith("Address already in use")
        assert exact_values(run.lines()) == reference


def test_a_peer_that_never_joins_is_listed_after_start_timeout(workspace, reference):
    with RunProcess(workspace, "missing peer", *SETTINGS, "cluster.start_timeout=15") as run:
        stopped = run.pids(1)[1]
        os.kill(stopped, signal.SIGSTOP)
        code, output = run.end()
        assert code == 0, output
        (failed,) = run.events("rank-failed")
        assert (failed["cause"], failed["rank"], failed["step"]) == ("HANG", 1, 0)
        assert failed["message"].startswith("no heartbeat for 15.")
        assert failed["message"].endswith("from rank 1")
        assert not Path(f"/proc/{stopped}").exists()
        assert exact_values(run.lines()) == reference
