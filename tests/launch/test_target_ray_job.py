"""Jobs of another Ray: a run is submitted over HTTP with its code, and does not need the process that submitted it."""

import contextlib
import http.server
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import ray
import yaml
from conftest import MANTA

from manta.data.errors import InputError
from manta.launch import __version__, config
from manta.launch.targets import ray_job
from manta.launch.targets.ray_job import copy_manta, copy_run
from manta.trainer.metrics import read_metrics
from manta.trainer.run_directory import RunDirectory

ADDRESS = "127.0.0.6"
PORT = 8271
NOWHERE = ("run.dir=/nowhere/run", "data.directory=/nowhere", "data.sources=[/nowhere/a.txt]")
HTTP = f"http://{ADDRESS}:{PORT}"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter with everything that manta imports, and Ray's dashboard, but without manta."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "rest.pth").write_text(sysconfig.get_path("purelib") + "\n")  # without the .pth files there, which add manta
    install = [folder / "bin/python", "-m", "pip", "install", "--quiet", f"ray[default]=={ray.__version__}"]
    if subprocess.run(install, capture_output=True, check=False).returncode:
        pytest.skip("ray[default] cannot be installed")
    result = subprocess.run([folder / "bin/python", "-I", "-c", "import manta.cluster"], capture_output=True, text=True, check=False)
    assert "No module named 'manta'" in result.stderr
    return folder / "bin/python"


@contextlib.contextmanager
def running_ray(python, **environment):
    """`ray start --head` with its dashboard, with these environment variables."""
    command = [python, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats", "--port=0", "--num-cpus=1"]
    command += ["--num-gpus=0", f"--node-ip-address={ADDRESS}", f"--dashboard-host={ADDRESS}", f"--dashboard-port={PORT}"]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    inherited["PATH"] = f"{python.parent}:{inherited['PATH']}"
    temporary = Path("/tmp") / f"elsewhere-{secrets.token_hex(4)}"
    log = python.parents[2] / "log"
    with log.open("w") as output:
        command.append(f"--temp-dir={temporary}")
        streams = {"stdout": output, "stderr": output}
        process = subprocess.Popen(command, cwd=log.parent, env=inherited | environment, start_new_session=True, **streams)
    try:
        wait_for(lambda: answers() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(temporary, ignore_errors=True)


def answers():
    with socket.socket() as probe:
        return probe.connect_ex((ADDRESS, PORT)) == 0


def wait_for(condition, *, within=120.0):
    deadline = time.monotonic() + within
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return result


@pytest.mark.slow
def test_a_submitted_run_has_the_losses_of_a_local_one(workspace, python, tmp_path):
    """The model is the user's, and its file is sent with the job. Without the token the job is refused."""
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    (workspace.directory / "mine.py").write_text("from manta.trainer.model.llama import Llama\n\n\nclass Mine(Llama):\n    pass\n")
    sections = yaml.safe_load(workspace.config_file.read_text())
    sections["data"] |= {"sources": [str(workspace.directory / "documents/*.txt")], "directory": str(workspace.directory / "corpora")}
    sections["model"]["family"] = "mine:Mine"
    sections["run"]["dir"] = str(workspace.directory / "local")
    file = workspace.directory / "absolute.yaml"
    file.write_text(yaml.safe_dump(sections))
    local = workspace.manta("train", str(file))
    assert local.returncode == 0, local.stderr

    arguments = ("train", str(file), f"run.dir={workspace.directory / 'submitted'}", "--on", HTTP)
    with running_ray(python, **environment):
        refused = workspace.manta(*arguments, RAY_AUTH_MODE="disabled")
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert f"--on: expected a Ray dashboard, got {HTTP}" in refused.stderr
        submitted = workspace.manta(*arguments, **environment)
        assert submitted.returncode == 0, submitted.stderr
        run_directory = RunDirectory(workspace.directory / "submitted")
        wait_for(lambda: run_directory.events_file.exists() and '"run-ended"' in run_directory.events_file.read_text(), within=200)
        remote = workspace.manta("at", HTTP, "status", str(run_directory.path), "--json", **environment)
        assert (remote.returncode, json.loads(remote.stdout)) == (
            0,
            json.loads(workspace.manta("status", str(run_directory.path), "--json").stdout),
        )
        for command in (("logs", str(run_directory.path), "--rank", "1"), ("stop", str(run_directory.path))):
            local = workspace.manta(*command)
            remote = workspace.manta("at", HTTP, *command, **environment)
            assert (remote.returncode, remote.stdout) == (local.returncode, local.stdout + local.stderr)
        missing = workspace.manta("at", HTTP, "status", "/no/such run", **environment)
        assert (missing.returncode, missing.stdout) == (2, workspace.manta("status", "/no/such run").stderr)
    assert json.loads(run_directory.events_file.read_text().splitlines()[-1])["exit_code"] == 0
    lines = [read_metrics(workspace.directory / run / "metrics.jsonl") for run in ("local", "submitted")]
    assert [line["train/loss"] for line in lines[1]] == [line["train/loss"] for line in lines[0]]


@pytest.mark.slow
def test_nothing_is_submitted_to_a_ray_without_token(workspace, python):
    with running_ray(python, RAY_AUTH_MODE="disabled"):
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
    assert f"--on: expected a Ray cluster with a token, got {HTTP}" in refused.stderr


def test_a_command_for_an_unreachable_ray_is_refused(workspace):
    result = workspace.manta("at", f"http://{ADDRESS}:1", "status", "/shared/run")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"manta: at: expected a Ray dashboard, got http://{ADDRESS}:1" in result.stderr


def test_a_job_contains_config_manta_and_the_model_of_the_user(workspace, tmp_path, monkeypatch):
    package = tmp_path / "desk/models"
    package.mkdir(parents=True)
    (package / "mine.py").write_text("")
    monkeypatch.chdir(package.parent)
    copy_manta(tmp_path)
    copy_run(tmp_path, config.load(workspace.config_file, ["model.family=models.mine:Mine", f"run.dir={tmp_path / 'run'}"]))
    assert config.load(tmp_path / "run.yaml").run.dir == tmp_path / "run"
    assert (tmp_path / "models/mine.py").exists()
    code = "import manta.trainer.config.training as c, importlib.metadata as m; print(c.__file__, m.version('manta'))"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [str(tmp_path / "manta/trainer/config/training.py"), __version__]


@pytest.mark.parametrize(
    ("on", "overrides", "message"),
    [
        (f"http://{ADDRESS}:1", ("data.sources=[/corpus/a.txt]", "data.directory=/corpora", "run.dir=/runs/a"), "Connection refused"),
        (
            f"http://{ADDRESS}:1",
            (),
            "run.dir: expected an absolute path that the Ray's nodes share, got run. Change it: the job starts in another directory.",
        ),
        (f"ray://{ADDRESS}:10001", (), "Submit the run to the dashboard: --on http://HOST:8265."),
    ],
)
def test_a_run_that_cannot_be_submitted_is_refused(workspace, on, overrides, message):
    result = subprocess.run(
        [MANTA, "train", workspace.config_file, *overrides, "--on", on],
        cwd=workspace.directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert message in result.stderr


def test_without_the_dashboard_packages_the_extra_is_named(workspace, monkeypatch):
    monkeypatch.setattr(ray_job, "find_spec", lambda _: None)
    overrides = ["run.dir=/nowhere/run", "data.directory=/nowhere", "data.sources=[/nowhere/a.txt]"]
    with pytest.raises(InputError, match=r"--on: expected the packages of ray\[default\], got none. Run pip install 'manta\[dashboard\]'."):
        ray_job.submit(config.load(workspace.config_file, overrides), HTTP, insecure=False)


class Dashboard(http.server.BaseHTTPRequestHandler):
    """Answers as Ray's dashboard does, except where `answers` has something else for a path."""

    answers: ClassVar = {}
    submitted = 0

    def answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        path = self.path.partition("?")[0]
        if self.command == "POST":
            type(self).submitted += 1
        default = {
            "/api/version": VERSION,
            "/api/jobs/": "[]" if self.command == "GET" else '{"job_id": "1", "submission_id": "raysubmit_1"}',
        }
        code, body, *kind = self.answers.get((self.command, path)) or (200, default.get(path, "{}"))
        if callable(body):
            code, body = body(self)
        self.send_response(code)
        self.send_header("Content-Type", *(kind or ["application/json"]))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_PUT = do_POST = answer  # noqa: N815  their names

    def log_message(self, *_):
        pass


VERSION = json.dumps({"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": "s"})
NO_AGENT = f"Traceback (most recent call last):\n  File\nRuntimeError: {ray_job.NO_AGENT}, please try again later.\n"
PAGE = "<!DOCTYPE html>\n<html><body>It works!</body></html>"


@pytest.fixture
def dashboard():
    """A function: what to answer, by method and path -> the address of a dashboard that does."""
    servers = []

    def start(**answers):
        handler = type("Own", (Dashboard,), {"answers": {tuple(key.split(" ")): answer for key, answer in answers.items()}})
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", handler

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def submit(workspace, address: str) -> int:
    return ray_job.submit(config.load(workspace.config_file, NOWHERE), address, insecure=True)


def test_a_ray_without_an_agent_is_tried_again(workspace, dashboard, monkeypatch, capsys):
    monkeypatch.setattr(ray_job, "RETRY", 0.05)

    def late(handler):
        return (500, NO_AGENT) if handler.submitted < 3 else (200, '{"job_id": "1", "submission_id": "raysubmit_1"}')

    address, handler = dashboard(**{"POST /api/jobs/": (200, late)})
    assert submit(workspace, address) == 0
    out, messages = capsys.readouterr()
    assert (out, handler.submitted) == ("raysubmit_1\n", 3)
    assert messages.count("waiting up to 30 s for an agent of that Ray") == 1


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ({"POST /api/jobs/": (500, NO_AGENT)}, f"RuntimeError: {ray_job.NO_AGENT}, please try again later"),
        ({"POST /api/jobs/": (500, "Traceback (most recent call last):\n File\nOSError: no space")}, "OSError: no space"),
        ({"POST /api/jobs/": (502, PAGE, "text/html")}, "Request failed with status code 502"),
        ({"GET /api/version": (200, PAGE, "text/html")}, "something else answers there"),
        ({"GET /api/version": (200, '{"hello": 1}')}, "something else answers there"),
        ({"GET /api/version": (404, "")}, "Version check returned 404"),
        ({"POST /api/jobs/": (200, '{"hello": 1}')}, "something else answers there"),
        ({"POST /api/jobs/": (401, "no")}, "uthentication"),
        ({"POST /api/jobs/": (200, lambda _: time.sleep(1.5) or (200, ""))}, "Read timed out"),
    ],
)
def test_every_error_of_a_dashboard_is_one_line(workspace, dashboard, monkeypatch, answers, problem):
    for name, seconds in (("RETRY", 0.05), ("AGENT_TIMEOUT", 0.2), ("TIMEOUT", 0.5)):
        monkeypatch.setattr(ray_job, name, seconds)
    address, _ = dashboard(**answers)
    with pytest.raises(InputError) as refused:
        submit(workspace, address)
    message = str(refused.value)
    assert message.startswith(f"--on: expected a Ray dashboard, got {address} (")
    assert problem in message
    assert "\n" not in message
    assert len(message) < 700
    assert "<" not in message


def test_an_address_that_is_none_or_has_a_password_is_refused(workspace):
    for address in ("http://", "http://host:port", "http://[::1", "http://host:99999", "http://me:geheim@host:port"):
        with pytest.raises(InputError, match=r"^--on: expected http://HOST:PORT, got (?!.*geheim)"):
            submit(workspace, address)
    with pytest.raises(InputError, match=r"^--on: expected a URL without a password, got one for host\.") as refused:
        submit(workspace, "http://me:geheim@host:8265")
    assert "geheim" not in str(refused.value)


def test_a_web_server_is_not_taken_for_a_ray_without_token(workspace, dashboard):
    address, _ = dashboard(**{"GET /api/jobs/": (200, PAGE, "text/html")})
    with pytest.raises(InputError, match="something else answers there"):
        ray_job.submit(config.load(workspace.config_file, NOWHERE), address, insecure=False)
