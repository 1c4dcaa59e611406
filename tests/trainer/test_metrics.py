"""metrics.jsonl stays readable when its writer is killed, and has one valid line per step."""

import json
import os
import resource
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from manta.cluster.line_file import LineFile
from manta.cluster.protocol import LONGEST_LINE
from manta.trainer.loop import Loop
from manta.trainer.metrics import format_duration, read_metrics

LINE = {
    "tokens": 256,
    "train/loss": 5.5,
    "global_batch": 8,
    "sequence_length": 32,
    "tokens_per_second": 1132.3,
    "step_time": 0.2,
    "data/digest": 3282334500,
    "world_size": 2,
    "layout": "data 2, ZeRO-1",
}


def write(path, *steps, attempt=1):
    with closing(LineFile(path)) as file:
        for step in steps:
            file.write(json.dumps({"step": step, "attempt": attempt, **LINE}).encode())


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


def test_damaged_lines_are_skipped_and_the_first_is_named(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    write(path, 1)
    damaged = [
        b"",
        b"\0" * 5000,
        b"[1, 2]",
        b"null",
        b'{"step": 2}',
        json.dumps({"step": 2, "attempt": 1, **LINE, "seconds": {"step": "long"}}).encode(),
        json.dumps({"step": "2", "attempt": 1, **LINE}).encode(),
        json.dumps({"step": 2, "attempt": 1, **LINE, "step_time": float("nan")}).encode(),
        json.dumps({"step": 2, "attempt": 1, **LINE, "layout": "x" * 10**6}).encode(),
        b"[" * 100_000,
        b'{"step": ' + b"9" * 100_000 + b"}",
        b"\xff\xfe",
        b"x" * (LONGEST_LINE + 100),
    ]
    with path.open("ab") as file:
        file.writelines(line + b"\n" for line in damaged)
    write(path, 2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert caplog.messages == [
        f"{path}:2: expected JSON that the run wrote, got something else. The line is skipped, as are {len(damaged) - 1} more."
    ]


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
            read_metrics(path)


def write_many(path: Path, count: int) -> None:
    line = json.dumps({"step": 1, "attempt": 1, "time": 1796002781.6229455, **LINE, "memory/peak": 385138688})
    path.write_text("".join(f"{line.replace('1', str(step), 1)}\n" for step in range(1, count + 1)))


def test_a_hundred_thousand_lines_are_read_in_about_a_second(tmp_path):
    write_many(tmp_path / "metrics.jsonl", 100_000)
    start = time.process_time()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 100_000
    assert time.process_time() - start < 4, "it takes 0.8 s on an idle machine"


@pytest.mark.slow
def test_a_sparse_gigabyte_is_one_damaged_line_that_is_never_held_in_memory(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_many(path, 3)
    os.truncate(path, 1 << 30)
    with path.open("ab") as file:
        file.write(b"\n" + json.dumps({"step": 4, "attempt": 1, **LINE}).encode() + b"\n")
    start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    assert time.process_time() - start < 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000, "in KiB"


def test_a_missing_file_has_no_lines(tmp_path):
    assert read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (61, "1m01s"), (3 * 3600 + 300, "3h05m"), (2 * 86400 + 4 * 3600, "2d04h")]
)
def test_durations_have_two_units_at_most(seconds, text):
    assert format_duration(seconds) == text


def test_a_peak_that_was_measured_on_a_busy_machine_is_measured_again():
    loop = SimpleNamespace(peak_flops=1e3, dtype=torch.float32, world=SimpleNamespace(device=torch.device("cpu")))
    assert Loop.utilization(loop, 500.0) == 0.5
    assert loop.peak_flops == 1e3
    assert 0 <= Loop.utilization(loop, 2e3) < 0.01, "any machine does more than 200,000 operations a second"
    assert loop.peak_flops > 1e6
    assert Loop.utilization(loop, 1e30) == 1
    assert Loop.utilization(SimpleNamespace(peak_flops=None), 1e9) is None
