"""metrics.jsonl stays readable when its writer is killed, and has one valid line per step."""

import json

import pytest

from manta.trainer.metrics import format_duration, open_metrics, read_metrics


def write(path, *steps, attempt=1):
    with open_metrics(path) as file:
        for step in steps:
            file.write(json.dumps({"step": step, "attempt": attempt}) + "\n")


def test_an_incomplete_last_line_is_ignored_then_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    with path.open("a") as file:
        file.write('{"step": 3, "att')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    write(path, 3)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]


def test_a_resumed_run_replaces_the_lines_from_its_first_step_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, 3, 4, 5)
    write(path, 3, attempt=2)
    assert [(line["step"], line["attempt"]) for line in read_metrics(path)] == [(1, 1), (2, 1), (3, 2)]


def test_a_missing_file_has_no_lines(tmp_path):
    assert read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (61, "1m01s"), (3 * 3600 + 300, "3h05m"), (2 * 86400 + 4 * 3600, "2d04h")]
)
def test_durations_have_two_units_at_most(seconds, text):
    assert format_duration(seconds) == text
