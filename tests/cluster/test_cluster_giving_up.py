"""Runs that a restart can not mend. Those that quick tests look at are started together, and so are the others."""

import pytest
from cluster_scene import Scene


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("giving-up")
    always = list(range(1, 10))
    scenes = {
        "twice": Scene(root / "twice", {"steps": 50, "faults": [[5, [always, 1], "raise"]]}, cluster={"keep_logs": 1}),
        "input": Scene(root / "input", {"faults": [[0, [always, 0], "input"]]}),
        "stillborn": Scene(root / "stillborn", {}, program=["-c", "import sys; print('there is no module named nonsense'); sys.exit(3)"]),
    }
    yield scenes
    for scene in scenes.values():
        scene.close()


@pytest.fixture(scope="module")
def more_scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("more-giving-up")
    scenes = {
        "absent": Scene(root / "absent", {"warm_time": 99}, cluster={"start_timeout": 1, "max_restarts_without_progress": 0}),
        "missing": Scene(root / "missing", {}, program=["/no/such/program.py"]),
    }
    yield scenes
    for scene in scenes.values():
        scene.close()


def test_the_same_exception_at_the_same_step_is_not_tried_a_third_time(scenes):
    assert scenes["twice"].end() == 1
    events = scenes["twice"].events()
    assert [event["attempt"] for event in events if event["event"] == "rank-failed"] == [1, 2]
    assert scenes["twice"].event("decided", 2)["reason"] == (
        "rank 1 failed twice at step 5 with the same error: RuntimeError: a loss of nan"
    )
    assert [path.name for path in (scenes["twice"].directory / "logs").iterdir()] == ["attempt-0002"], "as many as are kept"


def test_bad_input_is_not_retried(scenes):
    assert scenes["input"].end() == 2
    assert scenes["input"].event("decided")["reason"] == "LookupError: no such file: corpus.jsonl"


def test_a_process_that_dies_before_it_has_a_place_is_told_by_its_own_words(scenes):
    assert scenes["stillborn"].end() == 1
    assert scenes["stillborn"].event("rank-failed")["message"] == "exit code 3: there is no module named nonsense"
    assert "nonsense" in scenes["stillborn"].log(1, 0)


@pytest.mark.slow
def test_a_program_that_does_not_exist_is_named(more_scenes):
    assert more_scenes["missing"].end() == 1
    assert "can't open file '/no/such/program.py'" in more_scenes["missing"].event("rank-failed")["message"]


@pytest.mark.slow
def test_ranks_that_never_come_up_are_listed(more_scenes):
    assert more_scenes["absent"].end() == 1
    assert "from rank 0, 1" in more_scenes["absent"].event("rank-failed")["message"]
