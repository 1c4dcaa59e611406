"""Runs that no restart can fix. Those of the quick tests start together, and so do the others."""

import pytest
from fake_run import FakeRun


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("giving-up")
    always = list(range(1, 10))
    runs = {
        "twice": FakeRun(root / "twice", {"steps": 50, "faults": [[5, [always, 1], "raise"]]}, cluster={"keep_logs": 1}),
        "input": FakeRun(root / "input", {"faults": [[0, [always, 0], "input"]]}),
        "stillborn": FakeRun(root / "stillborn", {}, program=["-c", "import sys; print('there is no module named nonsense'); sys.exit(3)"]),
    }
    yield runs
    for run in runs.values():
        run.close()


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("more-giving-up")
    runs = {
        "absent": FakeRun(root / "absent", {"warm_time": 99}, cluster={"start_timeout": 1, "max_restarts_without_progress": 0}),
        "missing": FakeRun(root / "missing", {}, program=["/no/such/program.py"]),
        "unreadable": FakeRun(root / "unreadable", {"steps": 100, "step_time": 0.05}),
    }
    yield runs
    for run in runs.values():
        run.close()


def test_the_same_exception_twice_at_one_step_ends_the_run(runs):
    assert runs["twice"].end() == 1
    events = runs["twice"].events()
    assert [event["attempt"] for event in events if event["event"] == "rank-failed"] == [1, 2]
    reason = runs["twice"].event("decided", 2)["reason"]
    assert reason == "rank 1 failed twice at step 5 with the same error: RuntimeError: a loss of nan"
    assert [path.name for path in (runs["twice"].directory / "logs").iterdir()] == ["attempt-0002"], "keep_logs is 1"


def test_bad_input_is_not_retried(runs):
    assert runs["input"].end() == 2
    assert runs["input"].event("decided")["reason"] == "LookupError: no such file: corpus.jsonl"


def test_a_process_that_dies_as_a_standby_is_reported_by_its_output(runs):
    assert runs["stillborn"].end() == 1
    assert runs["stillborn"].event("rank-failed")["message"] == "exit code 3: there is no module named nonsense"
    assert "nonsense" in runs["stillborn"].log(1, 0)


@pytest.mark.slow
def test_a_missing_program_is_named(more_runs):
    assert more_runs["missing"].end() == 1
    assert "can't open file '/no/such/program.py'" in more_runs["missing"].event("rank-failed")["message"]


@pytest.mark.slow
def test_ranks_without_a_heartbeat_are_listed(more_runs):
    assert more_runs["absent"].end() == 1
    assert "from rank 0, 1" in more_runs["absent"].event("rank-failed")["message"]


@pytest.mark.slow
def test_logs_that_cannot_be_read_for_a_while_are_no_failure(more_runs):
    run = more_runs["unreadable"]
    run.event("first-step")
    (run.directory / "logs").rename(run.directory / "logs elsewhere")
    (run.directory / "logs").symlink_to("x" * 300)  # an error for root as well, as a network disk's would be
    assert run.end() == 0, run.output()
