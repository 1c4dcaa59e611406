"""A Ray cluster that runs already: joined if it requires a token, and refused otherwise."""

import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manta.trainer.metrics import read_metrics


class RunningRay:
    """`ray start --head`, as its owner runs it."""

    def __init__(self, folder: Path, *, token: bool, **settings: str) -> None:
        file = folder / "token"
        file.touch(mode=0o600)
        file.write_text(secrets.token_hex(32))
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)} if token else {"RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats", "--port=0"]
        command += ["--node-ip-address=127.0.0.5", "--num-cpus=1", "--num-gpus=0", "--include-dashboard=false", f"--temp-dir={folder}"]
        environment = os.environ | self.environment | {"RAY_USAGE_STATS_ENABLED": "0"} | settings
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        address = folder / "ray_current_cluster"
        deadline = time.monotonic() + 60
        while not address.exists():
            assert self.process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        self.address = address.read_text().strip()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(params=["with a token", "open"])
def running(request, tmp_path_factory):
    ray = RunningRay(tmp_path_factory.mktemp("ray"), token=request.param == "with a token")
    yield request.param, ray
    ray.close()


@pytest.mark.slow
def test_only_a_ray_with_token_is_joined(workspace, running):
    kind, ray = running
    arguments = ("train", str(workspace.config_file), f"run.dir=joined {kind}", "--on", ray.address)
    if kind == "open":
        refused = workspace.manta(*arguments, **ray.environment)
        assert refused.returncode == 2
        assert f"expected a Ray cluster with a token, got {ray.address}" in refused.stderr
        result = workspace.manta(*arguments, "--insecure", **ray.environment)
    else:
        refused = workspace.manta(*arguments, RAY_AUTH_MODE="disabled")
        assert refused.returncode == 2
        assert f"expected the address of a Ray cluster that this machine is a node of, got {ray.address}" in refused.stderr
        result = workspace.manta(*arguments, **ray.environment)
    assert result.returncode == 0, result.stderr
    assert len(read_metrics(workspace.directory / f"joined {kind}/metrics.jsonl")) == 40
    assert ray.process.poll() is None, "the run does not end it"


@pytest.mark.slow
def test_agents_that_ray_kills_for_lack_of_memory_are_lost_nodes(workspace, tmp_path_factory):
    ray = RunningRay(tmp_path_factory.mktemp("ray"), token=True, RAY_memory_usage_threshold="0.001", RAY_memory_monitor_refresh_ms="100")
    try:
        arguments = ("train", str(workspace.config_file), "run.dir=no memory", "cluster.start_timeout=20", "--on", ray.address)
        result = workspace.manta(*arguments, **ray.environment)
    finally:
        ray.close()
    assert result.returncode == 1, result.stderr
    assert "its agent has died (OutOfMemoryError)" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_an_unreachable_ray_is_refused(workspace):
    result = workspace.manta("train", str(workspace.config_file), "run.dir=nowhere", "--on", "127.0.0.1:1")
    assert result.returncode == 2
    assert "--on: expected the address of a Ray cluster that this machine is a node of, got 127.0.0.1:1" in result.stderr


def test_an_unknown_target_is_refused(workspace):
    result = workspace.manta("train", str(workspace.config_file), "run.dir=nowhere", "--on", "the moon")
    assert result.returncode == 2
    assert "--on: expected one of local, ssh:FILE" in result.stderr
    assert "got 'the moon'" in result.stderr
