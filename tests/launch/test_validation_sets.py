"""Validation sets of the user's own files: prepared, evaluated at their intervals, and kept when a run resumes."""

import json

import pytest
from runs import lines
from small_corpora import documents, write_lines

SHORT = ("train.steps=6", "checkpoint.every_steps=3", "evaluate.every_steps=4", "evaluate.samples=8")


def sets(workspace, *named: dict) -> str:
    return "evaluate.sets=" + json.dumps([{"path": str(workspace.directory / "sets" / f"{one['name']}.jsonl"), **one} for one in named])


@pytest.fixture(scope="module")
def files(workspace):
    (workspace.directory / "sets").mkdir()
    for seed, name in enumerate(("letters", "more")):
        write_lines(workspace.directory / "sets" / f"{name}.jsonl", documents(30, seed=seed))
    return workspace.directory / "sets"


def losses_of(workspace, run: str, name: str) -> dict[int, float]:
    return {line["step"]: line[f"eval/{name}/loss"] for line in lines(workspace, run) if f"eval/{name}/loss" in line}


@pytest.mark.usefixtures("files")
def test_sets_are_evaluated_at_their_own_intervals(workspace):
    named = sets(workspace, {"name": "letters", "every_steps": 2, "samples": 6}, {"name": "more"})
    done = workspace.train("with sets", *SHORT, named)
    letters, more = losses_of(workspace, "with sets", "letters"), losses_of(workspace, "with sets", "more")
    assert (list(letters), list(more)) == ([2, 4, 6], [4, 6])
    assert letters[6] != more[6]
    last = lines(workspace, "with sets")[-1]
    assert last["eval/letters/perplexity"] == pytest.approx(2.718281828459045 ** letters[6])
    assert 0 < last["eval/letters/bits_per_byte"] < 20
    assert f"letters loss {letters[2]:.4f} (bits per byte " in done.stdout


@pytest.mark.slow
def test_a_run_resumes_with_its_sets_on_other_ranks_and_without_their_files(workspace, files, tmp_path):
    named = sets(workspace, {"name": "more", "every_steps": 1})
    workspace.train("interrupted", *SHORT, named)
    whole = losses_of(workspace, "interrupted", "more")
    resumed = workspace.manta("resume", "interrupted", "train.steps=8", "cluster.ranks_per_node=1")
    assert resumed.returncode == 0, resumed.stderr
    (files / "more.jsonl").rename(tmp_path / "more.jsonl")
    resumed = workspace.manta("resume", "interrupted", "train.steps=10")
    assert resumed.returncode == 0, resumed.stderr
    workspace.train("whole", *SHORT)
    (tmp_path / "more.jsonl").rename(files / "more.jsonl")
    extended = losses_of(workspace, "interrupted", "more")
    assert list(extended) == list(range(1, 11))
    assert {step: extended[step] for step in whole} == whole
    with_sets, without = ([line["train/loss"] for line in lines(workspace, run)[:6]] for run in ("interrupted", "whole"))
    assert with_sets == without, "sets change no training"


def test_a_set_without_enough_text_or_with_a_name_twice_is_refused(workspace, files):
    write_lines(files / "empty.jsonl", ["a"])
    refused = workspace.manta("train", str(workspace.config_file), "run.dir=refused", *SHORT, sets(workspace, {"name": "empty"}))
    assert (refused.returncode, refused.stderr.count("expected at least 33 for a sample of 32, got 2 train tokens in 'empty'")) == (2, 1), (
        refused.stderr
    )
    for name, problem in (
        ("letters", "expected a different name for each set"),
        ("loss", "expected a different name"),
        ("a/b", "expected"),
    ):
        twice = [{"name": name}, {"name": name}] if name == "letters" else [{"name": name}]
        refused = workspace.manta("train", str(workspace.config_file), "run.dir=refused", *SHORT, sets(workspace, *twice))
        assert refused.returncode == 2, refused.stderr
        assert problem in refused.stderr
        assert refused.stderr.count("\n") == 1, refused.stderr
    assert not (workspace.directory / "refused").exists()
