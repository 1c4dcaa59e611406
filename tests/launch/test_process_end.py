"""How the process of `manta train` ends: at once, and with everything that it has started, whatever fails."""

import subprocess
import sys

import pytest
from runs import events, processes_of, wait_for_step

STUCK = """
import atexit, sys, threading
import ray
from manta.launch import __main__, cli
atexit.register(threading.Event().wait)  # as Ray's code, if it could start no thread
def end():
    print("all of the output")
    sys.exit(75)
cli.app = lambda prog_name: end()
sys.argv = ["manta", "train"]
__main__.main()
"""

BROKEN = """
import sys
from manta.launch import __main__
from manta.launch.run import display
def fail(self, line):
    raise RuntimeError("a mistake in the display")
display.Display._show_metrics = fail
sys.argv = ["manta", "train", *sys.argv[1:]]
__main__.main()
"""


def test_code_that_hangs_while_python_ends_does_not_keep_the_process():
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (75, "all of the output\n"), done.stderr


@pytest.mark.slow
def test_a_mistake_in_the_display_ends_the_run_in_order(workspace):
    command = [sys.executable, "-P", "-c", BROKEN, str(workspace.config_file), "run.dir=broken", "train.steps=100000"]
    done = subprocess.run(command, cwd=workspace.directory, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert done.stderr.endswith("RuntimeError: a mistake in the display\n")
    assert not processes_of(workspace, "broken")
    again = subprocess.Popen(
        [sys.executable, "-P", "-m", "manta.launch", "train", str(workspace.config_file), "run.dir=broken", "train.steps=100000"],
        cwd=workspace.directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_step(workspace, "broken", 3, again)
    again.terminate()
    assert again.wait(60) == 75
    assert events(workspace, "broken")[-1]["event"] == "run-ended"
