"""The `manta checkpoint` commands, and the config keys of checkpoints, on real runs."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml

from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.reader import read_tensors
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.storage import open_backend
from manta.trainer.metrics import read_metrics


@pytest.fixture(scope="module")
def trained(workspace) -> Path:
    keep = ("checkpoint.keep=2", "checkpoint.keep_best=1", "checkpoint.keep_every=18")
    workspace.train("kept", *keep, "evaluate.every_steps=12", "train.steps=32", "optimizer.learning_rate=0.02")
    return workspace.directory / "kept"


@pytest.fixture
def run(workspace, trained, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(trained, workspace.directory / tmp_path.name))


def report_of(workspace, *arguments: str, code: int = 0):
    done = workspace.manta("checkpoint", *arguments, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_run_keeps_the_newest_the_best_and_every_nth(workspace, trained):
    losses = {line["step"]: line["eval/loss"] for line in read_metrics(trained / "metrics.jsonl") if "eval/loss" in line}
    saved = {step: losses.get(step) for step in (6, 12, 18, 24, 30, 32)}
    best = min((step for step in saved if saved[step] is not None), key=saved.__getitem__)
    listed = report_of(workspace, "list", "kept")["checkpoints"]
    assert [one["step"] for one in listed] == sorted({18, 30, 32, best}, reverse=True)
    assert {one["step"]: one["validation_loss"] for one in listed} == {one["step"]: saved[one["step"]] for one in listed}
    assert {(one["layout"], one["ranks"], one["attempt"]) for one in listed} == {("data 2, ZeRO-1", 2, 1)}
    shown = workspace.manta("checkpoint", "list", "kept").stdout
    assert "step-00000032" in shown
    assert "2 x data 2, ZeRO-1" in shown


def test_list_reports_the_checkpoints_of_a_run(workspace, finished_run):
    listed = report_of(workspace, "list", finished_run)["checkpoints"]
    assert [f"step-{one['step']:08d}" for one in listed] == open_backend(workspace.directory / finished_run / "checkpoints").names()
    assert [one["step"] for one in listed][:2] == [40, 36]
    assert {(one["layout"], one["ranks"], one["attempt"]) for one in listed} == {("data 2, ZeRO-1", 2, 1)}


@pytest.mark.slow
def test_verify_finds_a_damaged_checkpoint(workspace, run):
    assert [one["error"] for one in report_of(workspace, "verify", run.name)] == [None] * len(open_backend(run / "checkpoints").names())
    file = run / "checkpoints/step-00000030/rank-0001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    verified = report_of(workspace, "verify", run.name, code=1)
    assert [one["error"] is None for one in verified] == [True, False] + [True] * (len(verified) - 2)
    assert "rank-0001.safetensors: xxh3 of bytes 0..." in verified[1]["error"]
    shown = workspace.manta("checkpoint", "verify", f"{run.name}/checkpoints/step-00000032")
    assert (shown.returncode, shown.stdout.count("\n")) == (0, 1)
    assert re.search(r"valid: 1\.3 MB, [1-9][\d.]* [kMG]B/s$", shown.stdout.rstrip())


def test_inspect_measures_each_weight(workspace, finished_run):
    inspected = report_of(workspace, "inspect", finished_run, "--match", "blocks.0.*")
    assert inspected["step"] == 40
    backend = open_backend(workspace.directory / finished_run / "checkpoints")
    _, weights = catalog.load_newest_weights(backend)
    assert inspected["weights"].keys() == {name for name in weights if name.startswith("blocks.0.")}
    for name, weight in inspected["weights"].items():
        assert weight["master"]["norm"] == pytest.approx(float(weights[name].norm()), rel=1e-5)
        assert weight["master"]["largest"] == float(weights[name].abs().max())
        assert weight["master"]["shape"] == list(weights[name].shape)
        assert weight["exp_avg_sq"]["norm"] > 0
        assert weight["exp_avg"]["not_finite"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("trained")
def test_inspect_prints_a_table(workspace):
    shown = workspace.manta("checkpoint", "inspect", "kept").stdout
    assert "embedding.weight" in shown
    assert "exp_avg_sq norm" in shown
    refused = workspace.manta("checkpoint", "inspect", "kept", "--match", "nothing")
    assert refused.returncode == 2
    assert "got 'nothing'. Try 'blocks.*'." in refused.stderr


@pytest.mark.slow
def test_prune_never_deletes_the_newest_valid_checkpoint(workspace, run):
    backend = open_backend(run / "checkpoints")
    before = backend.names()
    (run / "checkpoints/step-00000032/rank-0000.safetensors").write_bytes(b"")
    backend.set_aside("step-00000018")
    announced = workspace.manta("checkpoint", "prune", run.name, "--dry-run", "--bad").stdout.splitlines()
    assert backend.names() == [name for name in before if name != "step-00000018"]
    deleted = workspace.manta("checkpoint", "prune", run.name, "--bad").stdout.splitlines()
    assert [line.removeprefix("would delete ") for line in announced] == [line.removeprefix("deleted ") for line in deleted]
    assert "deleted bad-step-00000018" in deleted
    assert backend.names() == ["step-00000032", "step-00000030"], "the newest is bad, so the one before it is kept as well"
    assert backend.bad() == []
    (run / "checkpoints/step-00000030/manifest.json").unlink()
    failed = workspace.manta("checkpoint", "prune", run.name)
    assert failed.returncode == 1
    assert "every checkpoint is bad" in failed.stderr
    assert len(backend.names()) == 2


SLOW = [pytest.param(command, marks=pytest.mark.slow) for command in ("verify", "inspect", "prune")]


@pytest.mark.parametrize("command", ["list", *SLOW])
def test_commands_refuse_a_directory_without_checkpoints(workspace, command, tmp_path):
    refused = workspace.manta("checkpoint", command, str(tmp_path))
    assert refused.returncode == 2
    remedy = "Name a run's directory, an imported one, or checkpoints/step-..."
    assert refused.stderr == f"manta: {tmp_path}: expected checkpoints, got none. {remedy}\n"


@pytest.mark.slow
def test_a_training_run_is_saved_on_request(workspace):
    shape = ("train.steps=3000", "checkpoint.every_steps=3000", "evaluate.every_steps=3000", "evaluate.samples=1")
    with workspace.start("train", str(workspace.config_file), "run.dir=requested", *shape) as running:
        try:
            deadline = time.monotonic() + 60
            while not (workspace.directory / "requested/metrics.jsonl").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            done = workspace.manta("checkpoint", "now", "requested", "--timeout", "30")
            assert done.returncode == 0, done.stderr
            refused = workspace.manta("checkpoint", "prune", "requested")
            assert refused.returncode == 2
            assert "another manta is running" in refused.stderr
        finally:
            running.terminate()
            running.communicate(timeout=60)
    path = Path(done.stdout.strip())
    assert path.parent == workspace.directory / "requested/checkpoints"
    steps = [int(name[5:]) for name in open_backend(path.parent).names()]
    assert len(steps) == 2, "the requested checkpoint, and the last one"
    assert steps[0] > steps[1] == int(path.name[5:])
    assert not (workspace.directory / "requested/save-now").exists()
    refused = workspace.manta("checkpoint", "now", "requested")
    assert refused.returncode == 2
    assert "expected a run that is training, got one that is not" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_is_saved_by_the_clock(workspace, asynchronous):
    run = f"every 1.2 s {asynchronous}"
    minutes = (
        "checkpoint.every_minutes=0.02",
        "checkpoint.every_steps=1000",
        "checkpoint.keep=1000",
        f"checkpoint.asynchronous={asynchronous}",
    )
    workspace.train(run, "train.steps=200", "evaluate.every_steps=1000", *minutes)
    lines = read_metrics(workspace.directory / run / "metrics.jsonl")
    seconds = lines[-1]["time"] - lines[0]["time"]
    saved = open_backend(workspace.directory / run / "checkpoints").names()
    assert seconds / 1.2 * 0.5 <= len(saved) <= seconds / 1.2 + 2


@pytest.mark.slow
def test_a_run_resumes_from_a_checkpoint_directory_elsewhere(workspace, tmp_path):
    elsewhere = f"checkpoint.directory={tmp_path / 'elsewhere'}"
    workspace.train("apart", elsewhere, "train.steps=6")
    assert open_backend(tmp_path / "elsewhere").names() == ["step-00000006"]
    assert not (workspace.directory / "apart/checkpoints").exists()
    assert report_of(workspace, "list", "apart")["at"] == str(tmp_path / "elsewhere")
    moved = workspace.manta("resume", "apart", "train.steps=12", f"checkpoint.directory={tmp_path / 'nowhere'}")
    assert moved.returncode == 2
    assert f"checkpoint.directory: expected the run's checkpoints, got {tmp_path / 'nowhere'}, which has none." in moved.stderr
    assert workspace.manta("resume", "apart", "train.steps=12").returncode == 0
    assert open_backend(tmp_path / "elsewhere").names()[0] == "step-00000012"
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "there")
    assert workspace.manta("resume", "apart", "train.steps=14", f"checkpoint.directory={tmp_path / 'there'}").returncode == 0
    assert [line["step"] for line in read_metrics(workspace.directory / "apart/metrics.jsonl")] == list(range(1, 15))


@pytest.mark.slow
def test_a_run_starts_from_the_weights_of_another_runs_checkpoint(workspace, trained):
    start = trained / "checkpoints/step-00000030"
    workspace.train("started", f"run.start_from={start}", "train.steps=2", "optimizer.learning_rate=1e-9", "schedule.warmup_steps=0")
    _, started = catalog.load_newest_weights(open_backend(workspace.directory / "started/checkpoints"))
    original = torch.empty(started["embedding.weight"].shape)
    backend = open_backend(start.parent)
    read_tensors(
        backend, catalog.read_manifest(backend, start.name), {"master/embedding.weight": TensorViews.from_whole(original)}, check_files=None
    )
    assert torch.allclose(started["embedding.weight"], original, atol=1e-7)
    assert yaml.safe_load((workspace.directory / "started/config.yaml").read_text())["run"]["start_from"] == str(start)
