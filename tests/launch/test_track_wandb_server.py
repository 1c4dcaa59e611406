"""Weights & Biases, online: its own client writes to a server on loopback that keeps what it gets. Training does not notice the server."""

import json
import os
import signal
import subprocess
import time

import pytest
from conftest import MANTA
from recorded_run import RecordedRun
from run_process import RunProcess, exact_values, run_undisturbed
from wandb_server import TrackedRun, WandbServer

from manta.cluster.protocol import ExitCode
from manta.launch.goodput import goodput
from manta.trainer.metrics import read_all_metrics
from manta.trainer.serve.texts import GeneratedText

pytestmark = pytest.mark.slow
SETTINGS = ("train.steps=200", "evaluate.every_steps=100", "checkpoint.every_steps=50")
TRACKED = (*SETTINGS, "track.wandb.project=mine")


def only_run(server: WandbServer, directory) -> TrackedRun:
    ((name, found),) = server.runs.items()
    assert name == (directory / "tracking-id").read_text()
    assert server.unknown == []
    return found


def rows(found: TrackedRun) -> list[tuple]:
    return [(row["step"], row["attempt"], row["train/loss"]) for row in found.history]


def test_the_server_has_a_row_for_each_line_over_a_rollback_and_restarts(tmp_path):
    run = RecordedRun(tmp_path / "mine")
    text = GeneratedText(step=12, seed=1, prompt="", text="a text").to_json() + b"\n"
    (run.directory / "samples.jsonl").write_bytes(text)
    with WandbServer() as server:
        run.to_the_kill()
        for go_on in (run.to_the_end, lambda: (run.directory / "report.html").write_text("a report"), lambda: None):
            # In a separate process: W&B's service lives as long as the process that started it.
            command = [MANTA, "track", str(run.directory), "--wandb", "project"]
            done = subprocess.run(command, env=os.environ | server.environment, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
            found = only_run(server, run.directory)
            assert rows(found) == [(line["step"], line["attempt"], line["train/loss"]) for line in run.lines]
            assert [row.get("eval/loss") for row in found.history] == [line.get("eval/loss") for line in run.lines]
            for name in ("manifest.json", "events.jsonl"):
                assert found.files[name] == (run.directory / name).read_bytes()
            go_on()
    assert (found.project, found.name) == ("project", "mine")
    assert found.config["train"]["value"]["steps"] == 12
    assert "cluster" not in found.config
    assert "hidden" not in json.dumps(found.config)
    assert found.summary["goodput/training"] == pytest.approx(goodput(run.events(), run.lines).share)
    assert found.summary["train/loss"] == run.lines[-1]["train/loss"]
    assert found.files["report.html"] == b"a report"
    assert found.files["samples.jsonl"] == text
    assert found.exit_codes == [ExitCode.KILLED, ExitCode.DONE, ExitCode.DONE]


@pytest.fixture(scope="module")
def reference(workspace) -> list[list]:
    return exact_values(run_undisturbed(workspace, "without wandb", *SETTINGS))


def test_a_run_with_a_kill_and_a_resume_is_one_run_there_with_its_files(workspace, reference):
    with WandbServer() as server:
        with RunProcess(workspace, "wandb", *TRACKED, **server.environment) as run:
            run.steps(1, 60)
            os.kill(run.pids(1)[1], signal.SIGKILL)
            run.steps(2, 60)
            run.process.send_signal(signal.SIGTERM)
            assert run.end()[0] == ExitCode.SAVED
        found = only_run(server, run.directory)
        assert found.exit_codes == [ExitCode.DONE]
        first_report = found.files["report.html"]
        assert first_report == (run.directory / "report.html").read_bytes()
        with RunProcess(workspace, "wandb", "resume", "wandb", **server.environment) as run:
            code, output = run.end()
            assert code == 0, output
        found = only_run(server, run.directory)
        assert exact_values(run.lines()) == reference
        lines = read_all_metrics(run.directory / "metrics.jsonl")
        assert rows(found) == [(line["step"], line["attempt"], line["train/loss"]) for line in lines]
        assert len(lines) > len(run.lines()), "no step was repeated"
        newest = {row["step"]: row["train/loss"] for row in sorted(found.history, key=lambda row: row["attempt"])}
        assert newest == {line["step"]: line["train/loss"] for line in run.lines()}
        for name in ("manifest.json", "events.jsonl", "report.html"):
            assert found.files[name] == (run.directory / name).read_bytes(), name
        assert found.files["report.html"] != first_report
        assert b"done" in found.files["report.html"]
        assert found.exit_codes == [ExitCode.DONE, ExitCode.DONE]


@pytest.mark.parametrize("trouble", ["500", "hangs", "gone", "hangs later", "gone later"])
def test_a_server_in_trouble_changes_no_loss_and_holds_up_only_the_end(workspace, reference, trouble):
    with WandbServer() as server:
        is_later = "later" in trouble

        def disturb() -> None:
            if trouble.startswith("gone"):
                server.close()
            else:
                server.trouble = 500 if trouble == "500" else "hang"

        if not is_later:
            disturb()
        with RunProcess(workspace, f"wandb {trouble}", *TRACKED, **server.environment) as run:
            run.steps(1, 20)
            if is_later:
                run.until(lambda: any(found.rows for found in server.runs.values()))
                disturb()
            run.event("run-ended")
            ended = time.monotonic()
            code, output = run.end()
            assert code == 0, output
            assert time.monotonic() - ended < 20
            assert exact_values(run.lines()) == reference
            assert (is_later or server.requests > 0) or trouble == "gone"
