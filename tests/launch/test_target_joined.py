"""A Ray that is there already: joined where it asks for a token, and refused where it does not."""

import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manta.trainer.metrics import read_metrics


class Started:
    """`ray start --head`, as its owner would."""

    def __init__(self, folder: Path, *, token: bool) -> None:
        file = folder / "token"
        file.touch(mode=0o600)
        file.write_text(secrets.token_hex(32))
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)} if token else {"RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats", "--port=0"]
        command += ["--node-ip-address=127.0.0.5", "--num-cpus=1", "--num-gpus=0", "--include-dashboard=false", f"--temp-dir={folder}"]
        there = os.environ | self.environment | {"RAY_USAGE_STATS_ENABLED": "0"}
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=there, stdout=log, stderr=log, start_new_session=True)
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
def there(request, tmp_path_factory):
    started = Started(tmp_path_factory.mktemp("ray"), token=request.param == "with a token")
    yield request.param, started
    started.close()


@pytest.mark.slow
def test_a_ray_is_joined_that_asks_for_a_token_and_no_other(workspace, there):
    kind, ray = there
    arguments = ("train", str(workspace.config_file), f"run.dir=joined {kind}", "--on", ray.address)
    if kind == "open":
        refused = workspace.manta(*arguments, **ray.environment)
        assert refused.returncode == 2
        assert f"expected a Ray that requires a token, got {ray.address}" in refused.stderr
        done = workspace.manta(*arguments, "--insecure", **ray.environment)
    else:
        refused = workspace.manta(*arguments, RAY_AUTH_MODE="disabled")
        assert refused.returncode == 2
        assert f"expected the address of a Ray that this machine is a node of, got {ray.address}" in refused.stderr
        done = workspace.manta(*arguments, **ray.environment)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(workspace.directory / f"joined {kind}/metrics.jsonl")) == 40
    assert ray.process.poll() is None, "it stays"


def test_a_ray_that_is_not_there_is_told(workspace):
    done = workspace.manta("train", str(workspace.config_file), "run.dir=nowhere", "--on", "127.0.0.1:1")
    assert done.returncode == 2
    assert "--on: expected the address of a Ray that this machine is a node of, got 127.0.0.1:1" in done.stderr


def test_a_target_that_is_none_is_told(workspace):
    done = workspace.manta("train", str(workspace.config_file), "run.dir=nowhere", "--on", "the moon")
    assert done.returncode == 2
    assert "--on: got 'the moon', wants one of local, ssh:FILE" in done.stderr
