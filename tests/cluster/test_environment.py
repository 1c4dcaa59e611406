"""Runs that are started in the environment of another job, or with a network interface of the user's choice."""

import pytest
from runs import lines

pytestmark = pytest.mark.slow
SHORT = ("train.steps=3", "checkpoint.every_steps=100", "evaluate.every_steps=100")


def test_a_run_that_is_started_below_torchrun_trains(workspace):
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "RANK": "1", "WORLD_SIZE": "2"}
    done = workspace.manta("train", str(workspace.config_file), "run.dir=below torchrun", *SHORT, **torchrun)
    assert done.returncode == 0, done.stderr
    assert [line["world_size"] for line in lines(workspace, "below torchrun")] == [2, 2, 2]


def test_the_interface_that_the_user_has_set_is_used(workspace):
    refused = workspace.manta("train", str(workspace.config_file), "run.dir=no such interface", *SHORT, GLOO_SOCKET_IFNAME="nosuch0")
    assert refused.returncode == 2, refused.stderr
    assert "InputError: GLOO_SOCKET_IFNAME: expected a network interface of" in refused.stdout
    assert "Traceback" not in refused.stdout + refused.stderr
