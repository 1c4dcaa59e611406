"""Control of a run through its directory: detach, attach, logs, stop."""

import json
import os
import shutil
import signal
import subprocess
import time
from threading import Timer

import pytest
from fuzz import manta

from manta.cluster.supervise.event_log import read_events
from manta.data.errors import InputError
from manta.launch.config import load
from manta.launch.control.attach import attach
from manta.launch.control.logs import logs
from manta.launch.control.status import status
from manta.launch.control.stop import stop
from manta.trainer.metrics import read_metrics
from manta.trainer.run_directory import RunDirectory

ENDLESS = ("train.steps=50000", "checkpoint.every_steps=50000", "evaluate.every_steps=50000", "evaluate.samples=1")


def wait_for(true, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.05)


def ended(running: subprocess.Popen, within: float = 30.0) -> tuple[int, str, str]:
    out, err = running.communicate(timeout=within)
    return running.returncode, out, err


@pytest.fixture
def background(workspace):
    """Start runs in the background; stop those that a test leaves running."""
    homes: list[RunDirectory] = []

    def start(*arguments: str, run: str) -> RunDirectory:
        homes.append(RunDirectory(workspace.directory / run))
        done = workspace.manta(*arguments, "--detach")
        assert done.returncode == 0, done.stderr
        assert f"manta attach {homes[-1].quoted}\n" in done.stderr
        return homes[-1]

    yield start
    for home in homes:
        until = time.monotonic() + 60
        while home.is_locked and time.monotonic() < until:
            home.stop_request_file.write_bytes(b"at once")
            time.sleep(0.2)


def steps(home: RunDirectory) -> int:
    return max((line["step"] for line in read_metrics(home.metrics_file)), default=0)


def test_a_background_run_is_attached_logged_and_stopped(workspace, background):
    home = RunDirectory(workspace.directory / "away")
    home.path.mkdir()
    home.stop_request_file.touch()  # of an earlier run that was killed
    background("train", str(workspace.config_file), "run.dir=away", *ENDLESS, run="away")
    with (
        workspace.start("attach", "away") as watching,
        workspace.start("attach", "away") as leaving,
        workspace.start("logs", "away", "--rank", "1", "--follow") as reading,
    ):
        wait_for(lambda: steps(home) > 3)
        leaving.send_signal(signal.SIGINT)
        code, _, output = ended(leaving)
        assert (code, "still running" in output) == (0, True)
        assert home.is_locked
        stopped = workspace.manta("stop", "away")
        code, output, messages = ended(watching)
        read = ended(reading)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout == f"step {steps(home)} is saved; resume with: manta resume {home.quoted}\n"
    assert (code, messages) == (75, "")
    assert "step " in output, "its metrics are shown"
    assert "stop requested: saving" in output.splitlines()[-3:-1], "the last step may follow it"
    assert output.splitlines()[-1] == f"stopped; {stopped.stdout.strip()}"
    assert read == (0, (home.logs / "attempt-0001/rank-0001.log").read_text(), "")
    assert "attempt 1 rank 1" in read[1]
    assert output.splitlines()[-1] in (home.logs / "controller.log").read_text()
    assert not home.stop_request_file.exists()
    with pytest.raises(InputError, match="expected a running run, got one that is not running"):
        stop(home.path, at_once=False, timeout=1)


def test_invalid_input_is_reported_before_detaching(workspace):
    refused = workspace.manta("train", str(workspace.config_file), "run.dir=nowhere", "train.stepz=3", "--detach")
    assert refused.returncode == 2
    assert "train.stepz: expected a key of train" in refused.stderr
    assert not (workspace.directory / "nowhere").exists()


@pytest.fixture
def past(workspace, tmp_path) -> RunDirectory:
    """The directory of a run that was started and killed."""
    home = RunDirectory(tmp_path / "a past run")
    home.logs.mkdir(parents=True)
    config = load(workspace.config_file, [f"run.dir={json.dumps(str(home.path))}"])
    home.config_file.write_text(config.to_yaml())
    add(home, "run-started", 0)
    return home


def add(home: RunDirectory, event: str, attempt: int, **details) -> None:
    with home.events_file.open("a") as file:
        file.write(json.dumps({"time": time.time(), "event": event, "attempt": attempt, **details}) + "\n")


def test_logs_finds_each_rank_and_attempt_and_lists_those_that_exist(workspace, past):
    with pytest.raises(InputError, match="expected a run that has started, got no rank's log"):
        list(logs(past.path, rank=0, attempt=None, follow=False))
    for attempt, ranks in ((7, 2), (8, 2), (11, 1)):
        (past.logs / f"attempt-{attempt:04d}").mkdir()
        for rank in range(ranks):
            (past.logs / f"attempt-{attempt:04d}/rank-{rank:04d}.log").write_text(f"rank {rank} of attempt {attempt}\n")
    assert list(logs(past.path, rank=0, attempt=None, follow=False)) == [b"rank 0 of attempt 11\n"]
    assert workspace.manta("logs", str(past.path), "--attempt", "8", "--rank", "1").stdout == "rank 1 of attempt 8\n"
    with pytest.raises(InputError, match=r"^--rank: expected a rank of attempt 11, got 1. Use 0.$"):
        list(logs(past.path, rank=1, attempt=None, follow=True))
    with pytest.raises(InputError, match=r"^--attempt: expected one whose logs are kept, got 9. Use 7 to 8, 11.$"):
        list(logs(past.path, rank=0, attempt=9, follow=False))


def test_logs_waits_for_a_rank_that_has_not_opened_its_log(past):
    (past.logs / "attempt-0001").mkdir()
    (past.logs / "attempt-0001/rank-0000.log").touch()
    with past.lock():
        add(past, "attempt-started", 1, ranks=[{"rank": 0, "pid": 1}, {"rank": 1, "pid": 2}])
        with pytest.raises(InputError, match="expected a rank of attempt 1, got 2"):
            next(logs(past.path, rank=2, attempt=None, follow=True))
        later = Timer(0.5, (past.logs / "attempt-0001/rank-0001.log").write_text, ["here I am"])
        later.start()
        assert next(logs(past.path, rank=1, attempt=None, follow=True)) == b"here I am"
        later.join()


def test_logs_follows_later_attempts_until_the_run_ends(workspace, past):
    def log(attempt: int):
        (past.logs / f"attempt-{attempt:04d}").mkdir(exist_ok=True)
        return (past.logs / f"attempt-{attempt:04d}/rank-0000.log").open("a", buffering=1)

    with past.lock():
        reading = workspace.start("logs", str(past.path), "--follow", bufsize=1)
        with log(1) as first:
            first.write("one\n")
            assert reading.stdout.readline() == "one\n"
            first.write("before it was cut\n")
            assert reading.stdout.readline() == "before it was cut\n"
            first.truncate(0)  # as logrotate does
            time.sleep(0.5)  # it looks
            first.write("after\n")
            assert reading.stdout.readline() == "after\n"
            first.write("the last of it\n")
        with log(2) as second:
            second.write("two\n")
            assert [reading.stdout.readline() for _ in range(2)] == ["the last of it\n", "two\n"]
            second.write("the end\n")
    assert ended(reading) == (0, "the end\n", "")


TRACE = "\n".join(["Traceback (most recent call last):", *(f'  File "model.py", line {n}, in forward' for n in range(40)), ""])


def test_a_run_that_gave_up_shows_the_error_of_the_failed_rank(workspace, past):
    for attempt in (1, 2):
        add(
            past,
            "rank-failed",
            attempt,
            rank=1,
            cause="EXCEPTION",
            step=5,
            message="own.Error: no such\nthing",
            traceback=f"{TRACE}own.Error: no such\nthing\n",
        )
    add(past, "decided", 2, decision="give up", reason="rank 1 failed twice at step 5 with the same error")
    add(past, "run-ended", 2, exit_code=1)
    shown = workspace.manta("attach", str(past.path))
    assert shown.returncode == 1
    output = shown.stderr.splitlines()
    assert output[0] == f"{past.path}: not running; it ended with exit code 1"
    assert output[-4:-1] == ['  File "model.py", line 39, in forward', "own.Error: no such", "thing"]
    assert output[-1].endswith(f"{past.logs}/attempt-0002/rank-0001.log")
    assert 'line 0, in forward"' not in shown.stderr, "only its last lines"


def test_attach_reports_a_killed_run(workspace, past):
    shown = workspace.manta("attach", str(past.path))
    assert shown.returncode == 1
    assert shown.stderr.splitlines()[-1] == f"killed; nothing is saved yet; resume with: manta resume {past.quoted}"
    past.events_file.unlink()
    with pytest.raises(InputError, match="expected a run that was started"):
        attach(past.path)


FAILING = """
from manta.trainer.model.llama import Llama


class Failing(Llama):
    def forward(self, *given, **named):
        raise RuntimeError("it never works")
"""


@pytest.mark.slow
def test_a_run_ends_with_the_error_that_its_model_raises(workspace):
    (workspace.directory / "failing.py").write_text(FAILING)
    failed = workspace.train("failing", "model.family=failing:Failing", code=1)
    home = RunDirectory(workspace.directory / "failing")
    output = failed.stderr.splitlines()
    assert output[-2] == "RuntimeError: it never works"
    assert 'raise RuntimeError("it never works")' in output[-3]
    path = output[-1].rpartition(": ")[2]
    assert path.startswith(f"{home.logs}/attempt-0002/rank-000")
    shown = workspace.manta("attach", "failing")
    assert (shown.returncode, shown.stderr.splitlines()[-3:]) == (1, output[-3:])


@pytest.mark.slow
def test_a_resumed_run_stops_at_once_and_deletes_old_logs(workspace, background):
    workspace.train("long", "train.steps=3")
    home = background("resume", "long", *ENDLESS, "cluster.keep_logs=1", run="long")
    wait_for(lambda: steps(home) > 5)
    done = workspace.manta("stop", "long", "--at-once", "--timeout", "20")
    assert (done.returncode, done.stdout) == (0, f"step 3 is saved; resume with: manta resume {home.quoted}\n")
    assert read_events(home.events_file)[-1]["exit_code"] == 130
    assert [path.name for path in sorted(home.logs.iterdir())] == ["attempt-0002", "controller.log"]


@pytest.mark.slow
def test_stop_reports_a_run_that_does_not_stop_in_time(workspace, background):
    home = background("train", str(workspace.config_file), "run.dir=stubborn", *ENDLESS, run="stubborn")
    wait_for(lambda: steps(home) > 3)
    (started,) = [event for event in read_events(home.events_file) if event["event"] == "attempt-started"]
    for rank in started["ranks"]:
        os.kill(rank["pid"], signal.SIGSTOP)
    second = workspace.manta("resume", "stubborn", "--detach")
    assert (second.returncode, "another manta is running" in second.stderr) == (2, True)
    late = workspace.manta("stop", "stubborn", "--timeout", "2")
    assert (late.returncode, "did not stop within 2 s" in late.stderr) == (1, True)
    done = workspace.manta("stop", "stubborn", "--at-once")
    assert done.returncode == 0, done.stderr
    assert not home.is_locked


def end(home: RunDirectory, code: int, *before: tuple[str, dict]) -> None:
    for kind, details in before:
        add(home, kind, 1, **details)
    add(home, "run-ended", 1, exit_code=code)


FAILED = ("rank-failed", {"rank": 0, "cause": "SIGNAL", "step": 3, "message": "killed by SIGKILL"})
LOST = ("node-lost", {"node": 1, "message": "its agent has died"})
GAVE_UP = ("decided", {"decision": "give up", "reason": "3 restarts without progress"})


@pytest.mark.parametrize(
    ("code", "before", "state", "reason"),
    [
        (0, (FAILED,), "done", "done"),
        (1, (FAILED, GAVE_UP), "failed", "3 restarts without progress"),
        (1, (GAVE_UP, FAILED), "failed", "killed by SIGKILL"),
        (2, (("decided", {"decision": "give up", "reason": "no layout"}),), "failed", "no layout"),
        (75, (("leaving", {"signal": "SIGTERM"}),), "stopped, saved", "stop requested by SIGTERM"),
        (130, (), "interrupted", "interrupted"),
    ],
)
def test_status_says_why_a_run_has_ended_and_exits_with_its_code(past, code, before, state, reason):
    end(past, code, *before)
    report = status(past.path)
    assert {key: report[key] for key in ("state", "exit_code", "exit_reason")} == {"state": state, "exit_code": code, "exit_reason": reason}
    assert "seconds_left" not in report
    assert manta("status", str(past.path), "--exit-code").code == code
    shown = manta("status", str(past.path))
    assert (shown.code, f"{state}; resume with: manta resume {past.quoted}" in shown.stdout) == (0, code != 0)


@pytest.mark.parametrize(
    ("code", "before", "expected", "cause"),
    [
        (0, (FAILED,), "done", None),
        (75, (FAILED, ("leaving", {"signal": "SIGTERM"})), "stopped", None),
        (130, (), "stopped", None),
        (143, (), "stopped", None),
        (1, (FAILED, GAVE_UP), "failed", "SIGNAL"),
        (1, (FAILED, ("rank-failed", FAILED[1] | {"cause": "HOPELESS"})), "failed", "UNRECOVERABLE"),
        (1, (FAILED, LOST, GAVE_UP), "failed", "NODE_LOST"),
        (1, (("node-lost", LOST[1] | {"announced": True}), GAVE_UP), "failed", "PREEMPTED"),
        (1, (FAILED, ("run-started", {}), GAVE_UP), "failed", None),
        (2, (("node-unfit", {"message": "no manta"}),), "usage", "INPUT"),
        (2, (("decided", {"decision": "give up", "reason": "no layout"}),), "usage", None),
    ],
)
def test_a_program_can_tell_how_a_run_has_ended(past, code, before, expected, cause):
    end(past, code, *before)
    report = json.loads(manta("status", str(past.path), "--json").stdout)
    assert (report["exit"], report["cause"]) == (expected, cause)


def test_status_has_codes_of_its_own_for_a_run_that_has_not_ended(past):
    add(past, "rank-failed", 1, **FAILED[1])
    assert manta("status", str(past.path), "--exit-code").code == 4
    report = status(past.path)
    assert (report["exit_reason"], report["exit"], report["cause"]) == ("killed", "killed", None)
    with past.lock():
        running = manta("status", str(past.path), "--exit-code", "--json")
        assert (running.code, json.loads(running.stdout)["state"]) == (3, "running")
        assert "exit_reason" not in json.loads(running.stdout)
        assert (json.loads(running.stdout)["exit"], json.loads(running.stdout)["cause"]) == ("running", None)
    assert "3: it is running, 4: it was killed" in " ".join(manta("status", "--help").stdout.split())


COMMANDS = ("status", "attach", "logs", "resume", "stop", "generate", "export", "checkpoint list", "checkpoint verify", "data inspect")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_link_to_nothing_is_named_as_what_it_is(tmp_path, command):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    outcome = manta(*command.split(), str(tmp_path / "run"))
    assert outcome.code == 2
    assert f"{tmp_path}/run: expected a run directory, got a link to {tmp_path}/gone, which does not exist." in outcome.stderr


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("locked", "got"), [("", "no permission to read it"), ("..", "an error: Permission denied")])
def test_a_run_directory_that_another_user_may_not_read_is_one_line(public_directory, past, command, locked, got):
    run = shutil.copytree(past.path, public_directory / "folder/run")
    manta(*command.split(), str(public_directory / "none"))  # imports everything, as that user might not be able to
    (run / locked).chmod(0o600)
    os.seteuid(12345)
    try:
        outcome = manta(*command.split(), str(run))
    finally:
        os.seteuid(0)
    (line,) = outcome.stderr.splitlines()
    kind = "a config" if command.startswith("data") and locked else "a run directory"
    assert (outcome.code, line.startswith(f"manta: {run}: expected {kind}, got {got}. ")) == (2, True), line


@pytest.mark.parametrize("command", ["status", "resume", "logs"])
def test_a_directory_above_or_in_a_run_is_answered_with_the_run(tmp_path, command):
    run = tmp_path / "runs" / "mine"
    inner = run / "checkpoints" / "step-00000002"
    inner.mkdir(parents=True)
    for name in ("config.yaml", "manifest.json"):
        (run / name).touch()
    for directory in (run.parent, inner.parent, inner):
        outcome = manta(*command.split(), str(directory))
        assert outcome.code == 2
        assert outcome.stderr.startswith(f"manta: {directory}: expected a run directory, got no ")
        assert outcome.stderr.endswith(f". Did you mean {run}?\n")
    (tmp_path / "config.json").touch()  # a model of transformers
    assert f". Import it first: manta import {tmp_path}\n" in manta(*command.split(), str(tmp_path)).stderr
    (tmp_path / "source.json").touch()
    assert f". It is an import; train it: manta train FILE --weights-only {tmp_path}\n" in manta(*command.split(), str(tmp_path)).stderr
