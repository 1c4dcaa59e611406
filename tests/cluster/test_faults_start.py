"""What goes wrong before the first step: a port that another takes, a peer that never comes."""

import os
import signal
from pathlib import Path

import pytest
from live_run import LiveRun, exactly

pytestmark = pytest.mark.slow
SETTINGS = ("train.steps=20", "cluster.hot_standby=true")
THIEF = '''
import os
import socket
import sys
import threading
import time


def take():
    """The port that rank 0 has been given, as soon as it has been; in the first attempt."""
    while "MASTER_PORT" not in os.environ:
        time.sleep(0.0005)
    if (os.environ["RANK"], os.environ["MANTA_ATTEMPT"]) == ("0", "1"):
        taken.bind((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        taken.listen()


if "manta.trainer" in sys.orig_argv:
    taken = socket.socket()
    threading.Thread(target=take, daemon=True).start()
'''


@pytest.fixture(scope="module")
def undisturbed(workspace) -> list[list]:
    with LiveRun(workspace, "undisturbed at its start", *SETTINGS) as run:
        assert run.end()[0] == 0
        return exactly(run.lines())


def test_a_port_that_another_takes_first_is_told_and_the_next_attempt_asks_for_one_anew(workspace, undisturbed, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(THIEF)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with LiveRun(workspace, "robbed", *SETTINGS, PYTHONPATH=path) as run:
        code, told = run.end()
        assert code == 0, told
        (failed,) = run.events("rank-failed")
        assert (failed["attempt"], failed["rank"], failed["step"]) == (1, 0, 0)
        assert "a port that is free there" in failed["message"]
        assert failed["message"].endswith("Address already in use")
        assert exactly(run.lines()) == undisturbed


def test_a_peer_that_never_comes_is_listed_when_its_time_is_up(workspace, undisturbed):
    with LiveRun(workspace, "without a peer", *SETTINGS, "cluster.start_timeout=15") as run:
        missing = run.pids(1)[1]
        os.kill(missing, signal.SIGSTOP)
        code, told = run.end()
        assert code == 0, told
        (failed,) = run.events("rank-failed")
        assert (failed["cause"], failed["rank"], failed["step"]) == ("HANG", 1, 0)
        assert failed["message"].startswith("no sign of life within 15.")
        assert failed["message"].endswith("from rank 1")
        assert not Path(f"/proc/{missing}").exists()
        assert exactly(run.lines()) == undisturbed
