"""A Ray that is elsewhere: the run is submitted by HTTP, with its code, and goes on when whoever submitted it is gone."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import ray
import yaml
from conftest import MANTA

from manta.launch import __version__, config
from manta.launch.targets.ray_job import luggage, take_along
from manta.trainer.metrics import read_metrics
from manta.trainer.run_directory import RunDirectory

ADDRESS = "127.0.0.6"
PORT = 8271
NOWHERE = ("run.dir=/nowhere/run", "data.directory=/nowhere", "data.sources=[/nowhere/a.txt]")
HTTP = f"http://{ADDRESS}:{PORT}"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter that has all that manta imports, and Ray's dashboard, but no manta."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "rest.pth").write_text(sysconfig.get_path("purelib") + "\n")  # what its own .pth files add, manta among it, is not taken along
    wanted = [folder / "bin/python", "-m", "pip", "install", "--quiet", f"ray[default]=={ray.__version__}"]
    if subprocess.run(wanted, capture_output=True, check=False).returncode:
        pytest.skip("what Ray's dashboard needs can not be installed")
    there = subprocess.run([folder / "bin/python", "-I", "-c", "import manta.cluster"], capture_output=True, text=True, check=False)
    assert "No module named 'manta'" in there.stderr
    return folder / "bin/python"


@contextlib.contextmanager
def started(python, **environment):
    """`ray start --head` with its dashboard, and what a client has to have in its environment."""
    command = [python, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats", "--port=0", "--num-cpus=1"]
    command += ["--num-gpus=0", f"--node-ip-address={ADDRESS}", f"--dashboard-host={ADDRESS}", f"--dashboard-port={PORT}"]
    here = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    here["PATH"] = f"{python.parent}:{here['PATH']}"
    temporary = Path("/tmp") / f"elsewhere-{secrets.token_hex(4)}"
    log = python.parents[2] / "log"
    with log.open("w") as output:
        command.append(f"--temp-dir={temporary}")
        streams = {"stdout": output, "stderr": output}
        process = subprocess.Popen(command, cwd=log.parent, env=here | environment, start_new_session=True, **streams)
    try:
        until(lambda: answers() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(temporary, ignore_errors=True)


def answers():
    with socket.socket() as probe:
        return probe.connect_ex((ADDRESS, PORT)) == 0


def until(what, *, within=120.0):
    deadline = time.monotonic() + within
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


@pytest.mark.slow
def test_a_run_is_submitted_and_learns_what_it_would_have_here(workspace, python, tmp_path):
    """With a model of the user's own, whose file travels along; without the token it is turned away."""
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    (workspace.directory / "mine.py").write_text("from manta.trainer.model.llama import Llama\n\n\nclass Mine(Llama):\n    pass\n")
    whole = yaml.safe_load(workspace.config_file.read_text())
    whole["data"] |= {"sources": [str(workspace.directory / "documents/*.txt")], "directory": str(workspace.directory / "corpora")}
    whole["model"]["family"] = "mine:Mine"
    whole["run"]["dir"] = str(workspace.directory / "here")
    file = workspace.directory / "absolute.yaml"
    file.write_text(yaml.safe_dump(whole))
    here = workspace.manta("train", str(file))
    assert here.returncode == 0, here.stderr

    arguments = ("train", str(file), f"run.dir={workspace.directory / 'there'}", "--on", HTTP)
    with started(python, **environment):
        refused = workspace.manta(*arguments, RAY_AUTH_MODE="disabled")
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert f"--on: got {HTTP}, wants the address of a Ray's dashboard" in refused.stderr
        submitted = workspace.manta(*arguments, **environment)
        assert submitted.returncode == 0, submitted.stderr
        home = RunDirectory(workspace.directory / "there")
        until(lambda: home.events_file.exists() and '"run-ended"' in home.events_file.read_text(), within=200)
        told = workspace.manta("at", HTTP, "status", str(home.path), "--json", **environment)
        assert (told.returncode, json.loads(told.stdout)) == (0, json.loads(workspace.manta("status", str(home.path), "--json").stdout))
        for command in (("logs", str(home.path), "--rank", "1"), ("stop", str(home.path))):
            near = workspace.manta(*command)
            told = workspace.manta("at", HTTP, *command, **environment)
            assert (told.returncode, told.stdout) == (near.returncode, near.stdout + near.stderr)
        lost = workspace.manta("at", HTTP, "status", "/no/such run", **environment)
        assert (lost.returncode, lost.stdout) == (2, workspace.manta("status", "/no/such run").stderr)
    assert json.loads(home.events_file.read_text().splitlines()[-1])["exit_code"] == 0
    lines = [read_metrics(workspace.directory / run / "metrics.jsonl") for run in ("here", "there")]
    assert [line["train/loss"] for line in lines[1]] == [line["train/loss"] for line in lines[0]]


@pytest.mark.slow
def test_a_ray_that_asks_for_no_token_is_handed_nothing(workspace, python):
    with started(python, RAY_AUTH_MODE="disabled"):
        refused = workspace.manta(
            "train",
            str(workspace.config_file),
            "run.dir=/nowhere/run",
            "data.directory=/nowhere",
            "data.sources=[/nowhere/a.txt]",
            "--on",
            HTTP,
        )
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert f"--on: got {HTTP}, wants one that asks for a token" in refused.stderr


def test_a_command_that_nobody_can_be_asked_to_run_is_told(workspace):
    done = workspace.manta("at", f"http://{ADDRESS}:1", "status", "/shared/run")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"manta: at: got http://{ADDRESS}:1, wants the address of a Ray's dashboard" in done.stderr


def test_what_travels_is_the_config_this_manta_and_the_user_s_own_model(workspace, tmp_path, monkeypatch):
    package = tmp_path / "desk/models"
    package.mkdir(parents=True)
    (package / "mine.py").write_text("")
    monkeypatch.chdir(package.parent)
    luggage(tmp_path)
    take_along(tmp_path, config.load(workspace.config_file, ["model.family=models.mine:Mine", f"run.dir={tmp_path / 'run'}"]))
    assert config.load(tmp_path / "run.yaml").run.dir == tmp_path / "run"
    assert (tmp_path / "models/mine.py").exists()
    ask = "import manta.trainer.config.training as c, importlib.metadata as m; print(c.__file__, m.version('manta'))"
    told = subprocess.run(
        [sys.executable, "-P", "-c", ask], env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == [str(tmp_path / "manta/trainer/config.py"), __version__]


@pytest.mark.parametrize(
    ("on", "overrides", "told"),
    [
        (f"http://{ADDRESS}:1", ("data.sources=[/corpus/a.txt]", "data.directory=/corpora", "run.dir=/runs/a"), "Connection refused"),
        (
            f"http://{ADDRESS}:1",
            (),
            "run.dir: got run, wants an absolute path that the Ray's nodes share; the job begins in a directory of its",
        ),
        (f"ray://{ADDRESS}:10001", (), "by which a run would end with this terminal; submit it: --on http://HOST:8265"),
    ],
)
def test_what_can_not_be_submitted_is_told(workspace, on, overrides, told):
    done = subprocess.run(
        [MANTA, "train", workspace.config_file, *overrides, "--on", on],
        cwd=workspace.directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert told in done.stderr
