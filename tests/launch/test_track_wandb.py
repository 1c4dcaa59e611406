"""Weights & Biases, offline: what its client wrote for the server, read from its own files."""

import json
import struct
from pathlib import Path

import pytest
from fuzz import manta
from recorded_run import RecordedRun
from run_process import until
from wandb.proto.wandb_internal_pb2 import Record

from manta.launch.goodput import goodput

pytestmark = pytest.mark.slow  # its client takes seconds to start
BLOCK = 32768  # of LevelDB's log format


def records(file: Path) -> list[Record]:
    content, position, found, parts = file.read_bytes(), 7, [], b""  # 7 bytes: the file's own header
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in {1, 4}:  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    return RecordedRun(tmp_path / "mine")


def rows(found: list[Record]) -> list[dict]:
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]


def test_each_line_is_a_row_of_one_run_also_after_a_resume(run):
    ids = set()
    run.to_the_kill()
    for number, go_on in enumerate((run.to_the_end, lambda: None), start=1):
        done = manta("track", str(run.directory), "--wandb", "project", seconds=60)
        assert done.code == 0, done.stderr
        file = max(run.directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
        found = until(lambda file=file: (all_ := records(file)) and all_[-1].HasField("exit") and all_, within=20)
        written = rows(found)
        assert [(row["step"], row["attempt"], row["train/loss"]) for row in written] == [
            (line["step"], line["attempt"], line["train/loss"]) for line in run.lines
        ]
        assert [row["_step"] for row in written] == list(range(len(run.lines)))
        (header,) = [record.run for record in found if record.HasField("run")][:1]
        assert (header.project, header.display_name) == ("project", "mine")
        keys = {item.key for item in header.config.update}
        assert {"model", "train"} <= keys
        assert "cluster" not in keys
        files = {item.path for record in found if record.HasField("files") for item in record.files.files}
        assert {"manifest.json", "events.jsonl"} <= files
        summary = {item.key: json.loads(item.value_json) for record in found for item in record.summary.update}
        assert summary["goodput/training"] == pytest.approx(goodput(run.events(), run.lines).share)
        axes = {record.metric.glob_name: record.metric.step_metric for record in found if record.HasField("metric")}
        assert axes["*"] == "step"
        ids.add(header.run_id)
        assert header.run_id == (run.directory / "tracking-id").read_text()
        go_on()
        assert number <= 2
    assert len(ids) == 1
