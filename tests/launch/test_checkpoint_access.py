"""A checkpoint that this user may not read is named in one line, and is neither missing nor damaged."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fuzz import assert_refused_or_done, manta
from old_run import copy_old_run

from manta.launch.targets import dispatch  # another user cannot import it later

assert dispatch
OTHER = 12345  # a user who need not exist
LOCKED = [
    "checkpoints",
    "checkpoints/step-00000010",
    "checkpoints/step-00000010/manifest.json",
    "checkpoints/step-00000010/rank-0001.safetensors",
]
BOUND = [
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-dac_override,-dac_read_search",
]  # root, without its privilege


@pytest.fixture
def run(tmp_path, monkeypatch) -> Iterator[Path]:
    """A run of another user's, in a folder that all may enter."""
    run = copy_old_run(tmp_path / "work")
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(parent.stat().st_mode | 0o011)
    monkeypatch.chdir(run.parent)
    yield run
    for path in reversed(LOCKED):
        (run / path).chmod(0o700)


@contextmanager
def other_user() -> Iterator[None]:
    os.seteuid(OTHER)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("locked", [LOCKED[0], *(pytest.param(path, marks=pytest.mark.slow) for path in LOCKED[1:])])
def test_commands_name_a_checkpoint_that_this_user_may_not_read(run, locked):
    commands = [("checkpoint", "list"), ("checkpoint", "verify"), ("checkpoint", "inspect"), ("generate",), ("resume",)]
    commands = [(*command, str(run)) for command in commands if command != ("checkpoint", "list") or "rank" not in locked]
    for command in commands[:-1]:  # as root, to whom it is open: they succeed, and what they import is imported
        assert_refused_or_done(manta(*command, seconds=60), 0)
    for path in (run, *run.rglob("*")):
        os.chown(path, OTHER, OTHER)
    (run / locked).chmod(0)
    for command in commands:
        with other_user():
            outcome = manta(*command)
        assert_refused_or_done(outcome, *((0,) if command[1] == "list" and locked != "checkpoints" else (1,)))
        lines = [line for line in outcome.output.splitlines() if "Permission denied. Let this user read it." in line]
        assert len(lines) == 1, outcome.output
        assert str(run / locked) in lines[0]
        assert "no checkpoint" not in outcome.output
    assert not (run / "logs/attempt-0002").exists(), "no rank was started"
    with other_user():
        seen = manta("status", str(run))
    assert_refused_or_done(seen, 0)
    assert ("Permission denied" in seen.stderr) == (locked == "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("locked", LOCKED)
def test_a_rank_logs_a_line_and_no_traceback(run, locked):
    (run / locked).chmod(0)
    rank = [*(BOUND if os.geteuid() == 0 else []), sys.executable, "-P", "-m", "manta.trainer", str(run)]
    alone = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(rank, capture_output=True, text=True, timeout=120, check=False, env=alone)
    assert done.returncode == 1
    assert re.search(rf"{re.escape(str(run / locked))}\S*: Permission denied. Let this user read it.\n", done.stderr)
    assert "Traceback" not in done.stderr
    (run / locked).chmod(0o700)
    assert [path.name for path in (run / "checkpoints").glob("*step-*")] == ["step-00000010"], "it was not set aside"
