"""A preparation is never silent for long, also in a pipe, where it prints plain lines."""

import json
import random
import re
import string
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import MANTA
from small_corpora import SMALL, config, documents, write_lines

from manta.data.prepare import prepare, progress

CONFIG = """
run: {dir: run}
data:
  sources: {letters: {path: letters.jsonl, filter: {dedup: true}}, notes: notes}
  sequence_length: 32
  validation: 0.1
  packing: best_fit
tokenizer: {vocabulary: 4096}
model: {preset: llama-tiny}
train: {steps: 2, global_batch: 8, micro_batch: 4}
"""


def test_progress_without_an_advance_is_reported_regularly(capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.1)
    for total, size in ((None, ""), (10**6, "1.0 MB"), (16_400, "16.4 kB")):
        with progress.progress("work", total) as advance:
            time.sleep(0.35)
            advance((total or 0) // 2)
        lines = capsys.readouterr().err.splitlines()
        assert lines[:3] == ["work, 0 s"] * 3
        assert total is None or re.fullmatch(rf"work 50 % of {size}, \d+\.\d [kM]B/s, 0:00 left", lines[-1])


def test_training_a_tokenizer_is_reported_regularly(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    letters = "".join(random.Random(9).choices(string.ascii_letters, k=100_000))
    prepare.prepare(config(tmp_path / "corpora", write_lines(tmp_path / "x.jsonl", [letters, *documents(50)])), SMALL)
    assert "tokenizer: training, 0 s" in capsys.readouterr().err


@pytest.mark.slow
def test_no_phase_of_a_preparation_is_silent_for_more_than_five_seconds(tmp_path):
    write_corpus(tmp_path)
    times = []
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    for _ in range(2):  # the second verifies every byte
        with subprocess.Popen([MANTA, "prepare", "run.yaml"], cwd=tmp_path, **pipes) as process:
            times.append(time.monotonic())
            times += [time.monotonic() for _ in process.stderr]
        times.append(time.monotonic())
        assert process.returncode == 0
    gaps = [round(after - before, 1) for before, after in pairwise(times)]
    assert times[-1] - times[0] > 20
    assert max(gaps) < 8, gaps  # 5, and what a busy machine adds


def write_corpus(folder: Path) -> None:
    generator = random.Random(9)
    (folder / "run.yaml").write_text(CONFIG)
    with (folder / "letters.jsonl").open("w") as stream:
        for _ in range(2):
            stream.write(json.dumps({"text": "".join(generator.choices(string.ascii_letters, k=1_500_000))}) + "\n")
        for text in documents(20_000):
            stream.write(json.dumps({"text": text}) + "\n")
    (folder / "notes").mkdir()
    for number in range(40_000):
        (folder / "notes" / f"{number}.txt").write_text(f"note {number}\n")
