"""`manta status --watch`: the state of a run, live on a terminal, and once it has ended."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from socket import gethostname

import pytest
from conftest import MANTA
from fuzz import manta
from rich.console import Console
from run_process import RunProcess

from manta.launch.control.watch import LEVELS, ranks, sparkline


def test_a_run_that_has_ended_is_shown_once(workspace, finished_run):
    shown = manta("status", str(workspace.directory / finished_run), "--watch")
    assert shown.code == 0
    assert "40 of 40" in shown.stdout
    assert shown.stdout.endswith("\n")
    assert re.search(r"^goodput +\d+\.\d % of .* since the first start", shown.stdout, re.MULTILINE)
    assert re.search(rf"^loss +[{LEVELS}]{{40}} ", shown.stdout, re.MULTILINE)
    assert re.search(r"^\S+ ago +run-ended", shown.stdout, re.MULTILINE)
    assert "█ 100%" in shown.stdout


def test_it_is_not_for_programs(workspace, finished_run):
    refused = manta("status", str(workspace.directory / finished_run), "--watch", "--json")
    assert (refused.code, refused.stderr) == (2, "manta: --watch: expected no --json, which is for programs. Use one of them.\n")


def test_a_curve_has_the_means_of_its_parts():
    assert sparkline([1.0, 1.0], 60) == "▁▁"
    assert sparkline([0.0, 7.0, 3.0], 60) == "▁█▄"
    assert sparkline([8.0, 6.0, 0.0, 0.0, 3.0, 4.0], 3) == "█▁▅"


def test_of_many_ranks_those_that_are_silent_the_longest_are_shown():
    found = [{"rank": n, "node": "n", "phase": "step", "step": 7, "silent_seconds": float(n == 1900)} for n in range(2000)]
    out = Console(file=io.StringIO(), width=120)
    out.print(ranks({"ranks": found}))
    lines = out.file.getvalue().splitlines()
    assert re.search(r"^rank 1900 +n +step +step 7 +heartbeat 1\.0 s ago", "\n".join(lines), re.MULTILINE)
    assert lines[-1] == "and 1,992 ranks with newer heartbeats"


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, workspace, *arguments: str) -> None:
        self._reader, writer = pty.openpty()
        environment = os.environ | {"COLUMNS": "120", "LINES": "40", "TERM": "xterm"}
        streams = {"stdin": writer, "stdout": writer, "stderr": writer}
        self.process = subprocess.Popen([MANTA, *arguments], cwd=workspace.directory, env=environment, start_new_session=True, **streams)
        os.close(writer)
        self.text = ""

    def read_until(self, pattern: str, *, within: float = 60.0) -> None:
        end = time.monotonic() + within
        while not re.search(pattern, self.text):
            assert time.monotonic() < end, self.text[-3000:]
            if select.select([self._reader], [], [], 0.1)[0]:
                self.text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(self._reader, 1 << 16).decode())

    def end(self) -> int:
        try:
            return self.process.wait(30)
        finally:
            os.close(self._reader)


@pytest.mark.slow
def test_a_running_run_is_shown_live_until_it_ends_or_the_user_has_seen_enough(workspace):
    with RunProcess(workspace, "watched", "train.steps=100000") as run:
        run.steps(1, 5)
        enough = Terminal(workspace, "status", "watched", "--watch")
        enough.read_until(r"state +running")
        enough.read_until(r"memory +0\.\d\d GB at most, on rank 0")
        for rank in (0, 1):
            enough.read_until(rf"rank {rank} +{re.escape(gethostname())} +(step|read|save|evaluate) +step \d+ +heartbeat \d\.\d s ago")
        os.kill(run.pids(1)[1], signal.SIGSTOP)
        enough.read_until(r"rank 1 .* heartbeat [2-9]\.\d s ago")
        os.kill(run.pids(1)[1], signal.SIGCONT)
        enough.process.send_signal(signal.SIGINT)
        assert enough.end() == 0
        assert "Traceback" not in enough.text
        assert run.process.poll() is None

        listed = json.loads(workspace.manta("status", "watched", "--json").stdout)["ranks"]
        assert [(rank["rank"], rank["node"], rank["step"] > 0) for rank in listed] == [(0, gethostname(), True), (1, gethostname(), True)]

        watching = Terminal(workspace, "status", "watched", "--watch", "--exit-code")
        watching.read_until(r"step +(\d+) of 100000")
        first = int(re.findall(r"step +(\d+) of 100000", watching.text)[-1])
        watching.read_until(rf"step +(?!{first} )\d+ of 100000")
        run.process.send_signal(signal.SIGTERM)
        watching.read_until(r"stopped, saved")
        assert watching.end() == 75
        assert run.end()[0] == 75
    assert not (run.directory / "ranks.json").exists()
    assert json.loads(workspace.manta("status", "watched", "--json").stdout)["ranks"] == []
