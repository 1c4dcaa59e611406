"""metrics.jsonl stays readable whatever happens to its writer, and shows a run as it is."""

import pytest

from manta.trainer.metrics import MetricsLog, duration, read_metrics


def write(path, *steps, attempt=1):
    log = MetricsLog(path)
    for step in steps:
        log.write({"step": step, "attempt": attempt})
    log.close()


def test_half_a_line_is_not_read_and_the_next_writer_takes_it_away(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    with path.open("a") as file:
        file.write('{"step": 3, "att')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    write(path, 3)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]


def test_a_run_that_went_back_takes_back_what_it_wrote_from_there_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, 3, 4, 5)
    write(path, 3, attempt=2)
    assert [(line["step"], line["attempt"]) for line in read_metrics(path)] == [(1, 1), (2, 1), (3, 2)]


def test_no_file_is_no_line(tmp_path):
    assert read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.4, "0s"), (59, "59s"), (61, "1m01s"), (3 * 3600 + 300, "3h05m"), (2 * 86400 + 4 * 3600, "2d04h")]
)
def test_durations_are_told_as_people_say_them(seconds, told):
    assert duration(seconds) == told
