"""`manta compare` names where two runs diverge, and the right cause."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from fuzz import manta
from made_run import make_run
from run_process import RunProcess, run_undisturbed


def compare(*runs: Path) -> dict:
    found = manta("compare", *map(str, runs), "--json")
    assert found.code == 0, found.output
    return json.loads(found.stdout)


def cause(*runs: Path) -> tuple[int | None, str | None, str]:
    (one,) = compare(*runs)["divergence"]
    return one["step"], one["cause"], one["text"]


def change_line(run: Path, number: int, **changes: object) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | {key.replace("__", "/"): value for key, value in changes.items()})
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def changed_copy(run: Path, name: str, file: str, before: str, after: str) -> Path:
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    text = (copy / file).read_text()
    assert before in text
    (copy / file).write_text(text.replace(before, after))
    return copy


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "first")


def test_runs_with_the_same_values_are_bitwise_equal(run, tmp_path):
    killed = make_run(tmp_path / "killed", failures=((47, 40),))
    assert cause(run, killed) == (None, None, "bitwise equal in all 100 steps that both have logged, 1 to 100")


def test_other_samples_are_the_data(run, tmp_path):
    seed = make_run(tmp_path / "seed", seed=2, config={"run": {"seed": 2}})
    step, kind, text = cause(run, seed)
    assert (step, kind) == (1, "data")
    assert text.endswith("Cause: data: the step reads other samples; run.seed differs")


def test_a_changed_file_is_the_data(run):
    other = changed_copy(run, "corpus", "manifest.json", '"f0"', '"f1"')
    change_line(other, 31, data__digest=5, train__loss=1.0)
    step, kind, text = cause(run, other)
    assert (step, kind) == (31, "data")
    assert text.endswith("the corpus (f0 and f1) differs")
    assert "bitwise equal before, in 30 steps" in text


def test_another_learning_rate_is_the_config(run, tmp_path):
    other = make_run(tmp_path / "rate", config={"optimizer": {"learning_rate": 1e-3}})
    change_line(other, 2, train__loss=7.0)
    found = compare(run, other)
    assert found["config"] == {"optimizer.learning_rate": ["0.0003", "0.001"]}
    (one,) = found["divergence"]
    assert (one["step"], one["cause"], one["differs"]) == (2, "config", ["train/loss"])
    assert one["text"].endswith("Cause: config: optimizer.learning_rate differs")


def test_a_longer_schedule_is_the_config(run, tmp_path):
    other = make_run(tmp_path / "longer", steps=120)
    change_line(other, 2, learning_rate=1.0)
    assert cause(run, other)[:2] == (2, "config")
    assert "train.steps differs" in cause(run, other)[2]


def test_another_layout_is_arithmetic(run):
    other = changed_copy(run, "layout", "manifest.json", "2.13.0", "2.14.0")
    change_line(other, 50, train__loss=4.5, layout="data 1, ZeRO-1", world_size=1)
    step, kind, text = cause(run, other)
    assert (step, kind) == (50, "arithmetic")
    assert text.endswith("world_size 2 and 1, layout data 2, ZeRO-1 and data 1, ZeRO-1, versions.torch 2.13.0 and 2.14.0")


def test_arithmetic_without_an_explanation_says_so(run):
    other = changed_copy(run, "rounding", "metrics.jsonl", '"step": 9, ', '"step": 9, ')
    change_line(other, 9, grad_norm=0.123)
    assert cause(run, other)[2].endswith("Cause: arithmetic: layout, precision (fp32), versions and machine are the same")


def test_runs_without_a_step_in_common_are_not_equal(run, tmp_path):
    other = make_run(tmp_path / "empty")
    (other / "metrics.jsonl").unlink()
    assert cause(run, other) == (None, None, "no step that both have logged")


def test_a_comparison_is_printed_and_written(run, tmp_path):
    other = make_run(tmp_path / "second", config={"optimizer": {"learning_rate": 1e-3}})
    shown = manta("compare", str(run), str(other), str(run), "--html", str(tmp_path / "compare.html"))
    assert shown.code == 0, shown.output
    assert "optimizer.learning_rate" in shown.stdout
    assert "against" in shown.stdout.splitlines()[-1]
    html = (tmp_path / "compare.html").read_text()
    assert "Where the runs diverge" in html
    assert "optimizer.learning_rate" in html


def test_one_run_is_refused(run):
    refused = manta("compare", str(run))
    assert (refused.code, refused.stderr) == (2, "manta: RUN: expected two runs or more, got one. Name another one.\n")


@pytest.mark.slow
def test_real_runs_diverge_for_the_right_cause(workspace):
    run_undisturbed(workspace, "compared")
    run_undisturbed(workspace, "compared seed", "run.seed=6")
    run_undisturbed(workspace, "compared rate", "optimizer.learning_rate=2e-3")
    shutil.copytree(workspace.directory / "documents", workspace.directory / "changing")
    tokenizer = next((workspace.directory / "corpora").glob("tokenizer-*/tokenizer.json"))
    file = max((workspace.directory / "changing").iterdir(), key=lambda file: file.stat().st_size)
    for name in ("compared before", "compared after"):
        run_undisturbed(workspace, name, 'data.sources=["changing/*.txt"]', f"tokenizer.file={json.dumps(str(tokenizer))}")
        file.write_text(file.read_text().replace("self", "this"))
    with RunProcess(workspace, "compared kill", "train.steps=40") as killed:
        killed.steps(1, 15)
        os.kill(killed.pids(1)[1], signal.SIGKILL)
        code, output = killed.end()
        assert code == 0, output
    at = workspace.directory
    step, kind, text = cause(at / "compared", at / "compared seed")
    assert (step, kind) == (1, "data")
    assert "run.seed differs" in text
    step, kind, text = cause(at / "compared", at / "compared rate")
    assert kind == "config"
    assert text.endswith("optimizer.learning_rate differs")
    step, kind, text = cause(at / "compared before", at / "compared after")
    assert kind == "data"
    assert "other samples; the corpus (" in text
    assert cause(at / "compared", at / "compared kill")[2].startswith("bitwise equal in all 40 steps")
