"""Told to leave, by every means. Runs are started together and each is then told in its own way."""

import signal
import time
from contextlib import contextmanager

import pytest
from cluster_scene import Scene

STEPS = {"steps": 100_000}


@contextmanager
def together(root, plans):
    scenes = {name: Scene(root / name, plan, cluster={"grace_period": 0.5 if name == "slow" else 60}) for name, plan in plans.items()}
    try:
        for scene in scenes.values():
            scene.event("first-step")
        yield scenes
    finally:
        for scene in scenes.values():
            scene.close()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    plans = {"term": STEPS, "interrupt": {**STEPS, "save_time": 0.5}, "slow": {**STEPS, "save_time": 100}, "killed": STEPS}
    with together(tmp_path_factory.mktemp("leaving"), plans) as scenes:
        yield scenes


@pytest.fixture(scope="module")
def more_scenes(tmp_path_factory):
    plans = {"unsaved": {**STEPS, "save_fails": True}, "impatient": {**STEPS, "save_time": 100}}
    with together(tmp_path_factory.mktemp("more-leaving"), plans) as scenes:
        yield scenes


def test_sigterm_saves_and_asks_to_be_run_again(scenes):
    scenes["term"].signal(signal.SIGTERM)
    assert scenes["term"].end() == 75
    assert scenes["term"].event("leaving")["signal"] == "SIGTERM"


@pytest.mark.slow
def test_told_to_leave_and_nothing_saved_is_143(more_scenes):
    more_scenes["unsaved"].signal(signal.SIGHUP)
    assert more_scenes["unsaved"].end() == 143


def test_ctrl_c_saves_and_leaves(scenes):
    scenes["interrupt"].signal(signal.SIGINT)
    assert scenes["interrupt"].end() == 130
    assert all(event["outcome"] == "left" for event in scenes["interrupt"].events() if event["event"] == "attempt-stopped")


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once(more_scenes):
    more_scenes["impatient"].signal(signal.SIGINT)
    more_scenes["impatient"].event("leaving")
    more_scenes["impatient"].signal(signal.SIGINT)
    assert more_scenes["impatient"].end(within=8) == 130


def test_the_grace_time_ends(scenes):
    scenes["slow"].signal(signal.SIGUSR1)
    assert scenes["slow"].end(within=8) == 143


def test_a_killed_controller_leaves_no_rank_and_the_next_one_counts_on(scenes):
    scene = scenes["killed"]
    scene.process.kill()
    deadline = time.monotonic() + 5
    while (left := [c for c in scene.processes().values() if "cluster_fake_rank" in c or "NodeAgent" in c]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    again = Scene(scene.directory, {"steps": 3})
    assert again.event("attempt-started", 2)
    assert again.process.wait(30) == 0
    assert scene.log(2, 1)
    assert scene.process.wait() == -signal.SIGKILL
