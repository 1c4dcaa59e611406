"""`manta list`: all runs below a directory, whatever else is there."""

import json

from fuzz import manta


def test_runs_are_listed_with_their_state_and_size(workspace, finished_run, tmp_path):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper/finished").symlink_to(workspace.directory / finished_run)  # links are not entered
    listed = manta("list", str(workspace.directory), "--json")
    assert listed.code == 0
    run = next(run for run in json.loads(listed.stdout) if run["run"] == str(workspace.directory / finished_run))
    assert (run["state"], run["step"], run["steps"]) == ("done", 40, 40)
    assert run["bytes"] > (workspace.directory / finished_run / "metrics.jsonl").stat().st_size
    assert json.loads(manta("list", str(tmp_path), "--json").stdout) == []


def test_a_run_that_cannot_be_read_does_not_hide_the_others(workspace, finished_run, tmp_path):
    for name in ("broken", "intact"):
        (tmp_path / name).mkdir()
        for file in ("config.yaml", "events.jsonl", "metrics.jsonl", "manifest.json"):
            (tmp_path / name / file).write_bytes((workspace.directory / finished_run / file).read_bytes())
    (tmp_path / "broken/config.yaml").write_text("run: 1")
    shown = manta("list", str(tmp_path))
    assert shown.code == 0
    header, broken, intact, reason = shown.stdout.splitlines()
    assert header.split() == ["run", "state", "step", "loss", "validation", "tokens/s", "on", "disk"]
    assert "unreadable" in broken
    assert "40 of 40" in intact
    assert reason.startswith(f"{tmp_path}/broken/config.yaml: ")


def test_a_directory_that_is_missing_is_refused(tmp_path):
    refused = manta("list", str(tmp_path / "none"))
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
