"""The test that everyone does first: overfit to a document or a few, without validation text, with batches larger than an epoch."""

import json

import numpy as np
import pytest
import yaml
from run_process import Workspace
from small_corpora import documents, write_lines

from manta.data.sampling.samples import Samples
from manta.launch.config import load
from manta.launch.run.preflight import open_corpus
from manta.trainer.run_directory import RunDirectory

CONFIG = {
    "run": {"dir": "run"},
    "data": {"sources": ["x.jsonl"], "sequence_length": 32},
    "tokenizer": {"vocabulary": 300},
    "model": {"family": "llama", "layers": 1, "width": 32, "heads": 2},
    "optimizer": {"learning_rate": 0.02},
    "schedule": {"warmup_steps": 1},
    "train": {"steps": 30, "global_batch": 64, "micro_batch": 64},
    "cluster": {"hot_standby": False, "ranks_per_node": 1},
    "precision": "fp32",
}
TOO_FEW = "data.validation: too few documents to hold one out: the run measures no validation loss"


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    write_lines(tmp_path / "x.jsonl", documents(1))
    return tmp_path / "run.yaml"


@pytest.mark.parametrize("more", [{}, {"validation": 0}, {"packing": "best_fit"}, {"live": True, "validation": 0}])
def test_one_document_is_enough_to_train_on(config_file, tmp_path, capsys, more):
    config = load(config_file, [f"data.{key}={json.dumps(value)}" for key, value in more.items()])
    prepared, _ = open_corpus(RunDirectory(tmp_path / "run"), config)
    printed = " ".join(capsys.readouterr().err.split())
    assert (TOO_FEW in printed) == ("validation" not in more)
    if config.data.live:
        return
    samples = Samples(prepared, config.data, config.tokenizer, seed=0)
    assert samples.validation_windows == 0
    windows = len(samples.sampler.sources[0].dataset)
    assert f"train.global_batch: an epoch has only {windows} samples: a step of 64 reads samples more than once" in printed
    read = [samples.train(np.arange(first, first + 64)).tokens.tobytes() for first in (0, 64)]
    rows = samples.train(np.arange(3 * windows)).tokens.reshape(3, windows, -1)  # each epoch has each window once
    assert all(sorted(map(bytes, epoch)) == sorted(map(bytes, rows[0])) for epoch in rows)
    assert read[0] != read[1]


@pytest.mark.slow
@pytest.mark.parametrize("override", ["data.validation=0.01", "data.validation=0", "data.live=true"])
def test_a_run_overfits_to_one_document(config_file, tmp_path, override):
    more = [override, "data.validation=0"] if "live" in override else [override]
    result = Workspace(config_file=config_file, directory=tmp_path).manta("train", str(config_file), *more)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 30
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 1
    assert not any("eval/loss" in line for line in lines)
