"""A poisoned document makes the loss jump: the run names it, and continues as the run that never had it, or stops. Real runs."""

import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from runs import copy_run, events, lines, losses, resume

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.prepare.prepare import prepare
from manta.data.sampling.samples import Samples
from manta.data.tokenizer.tokenizer import Tokenizer
from manta.trainer.checkpoint.catalog import read_manifest
from manta.trainer.guard.record import read_spikes
from manta.trainer.run_directory import RunDirectory

STEPS, BATCH, LENGTH = 110, 8, 32
WINDOW = 24
FIRST = 78  # the first step that may read poison: the loss hardly falls any more
LAYOUTS = {
    "data 2": (),
    "tensor 2": ("parallel.tensor=2",),
    "ZeRO-3": ("parallel.zero=3",),
    "data 2, tensor 2, ZeRO-3": ("cluster.ranks_per_node=4", "parallel.tensor=2", "parallel.zero=3", "train.micro_batch=2"),
}
SLOW = {"tensor 2", "ZeRO-3"}


def poison(number: int) -> str:
    """Return text of characters that no other document has."""
    return "".join(random.Random(number).choices("@#$%^&*~|<>{}[]0123456789QXZJ", k=LENGTH - 8))


def write_config(directory: Path, poisoned: int) -> tuple[Path, dict[int, int]]:
    """Write a corpus of simple text with some poisoned lines, and a config with a seed for which these are read late.

    Returns the config, and the line in the corpus of each step that reads a poisoned one, by its number.
    """
    choices = random.Random(0)
    phrases = ("the cat sat", "on the mat", "and the dog ran", "to the red house")
    documents = [" ".join(choices.choice(phrases) for _ in range(5)) for _ in range(2500)]
    places = [200 + 300 * number for number in range(poisoned)]
    for place in places:
        documents[place] = poison(place)
    corpus = directory / "documents.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    data = {
        "sources": [str(corpus)],
        "sequence_length": LENGTH,
        "packing": "best_fit",
        "validation": 0.0,
        "directory": str(directory / "corpora"),
    }
    tokens = {"vocabulary": 320}
    samples_config = DataConfig.model_validate(data), TokenizerConfig.model_validate(tokens)
    prepared = prepare(*samples_config)
    tokenizer = Tokenizer(prepared.tokenizer, end_of_text="<|endoftext|>")
    dataset = Samples(prepared, *samples_config, seed=0).sampler.sources[0].dataset
    texts = [tokenizer.decode(row) for row in dataset.read(np.arange(len(dataset))).tokens.tolist()]
    windows = {number: place + 1 for place in places for number, text in enumerate(texts) if documents[place] in text}
    assert len(windows) == poisoned
    for seed in range(10_000):
        read = Samples(prepared, *samples_config, seed=seed).sampler.sources[0].order(np.arange(BATCH * STEPS))[1].tolist()
        steps = {1 + number // BATCH: windows[window] for number, window in enumerate(read) if window in windows}
        if len(steps) == poisoned and min(steps) > FIRST and max(steps) < min(STEPS - 4, min(steps) + WINDOW):
            break
    config = {
        "run": {"dir": "run", "seed": seed},
        "data": data,
        "tokenizer": tokens,
        "model": {"preset": "llama-tiny", "layers": 2, "width": 64, "mlp_width": 128},
        "optimizer": {"learning_rate": 4e-3, "beta2": 0.99},
        "schedule": {"shape": "constant"},
        "train": {"steps": STEPS, "global_batch": BATCH, "micro_batch": 4},
        "checkpoint": {"every_steps": 7, "keep": 20},
        "guard": {"spike_window": WINDOW},
        "track": {"tensorboard": False},
        "precision": "fp32",
        "cluster": {"ranks_per_node": 2, "hot_standby": False},
    }
    file = directory / "spikes.yaml"
    file.write_text(yaml.safe_dump(config))
    return file, steps


def configs_of(file):
    config = yaml.safe_load(file.read_text())
    return DataConfig.model_validate(config["data"]), TokenizerConfig.model_validate(config["tokenizer"])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("three"), 3)


def train(workspace, file, run, *overrides, code=0):
    result = workspace.manta("train", str(file), f"run.dir={run}", *overrides, timeout=200)
    assert result.returncode == code, result.stderr + result.stdout
    return result


def spikes(workspace, run):
    return read_spikes(workspace.directory / run / "spikes.jsonl")


def saved_files(workspace, run):
    """Return the hashes of all bytes of the newest checkpoint."""
    checkpoints = RunDirectory(workspace.directory / run).open_checkpoints()
    return [file.xxh3 for file in read_manifest(checkpoints, checkpoints.names()[0]).files]


def assert_bitwise_equal(workspace, run, other):
    assert losses(workspace, run) == losses(workspace, other)
    assert [line["data/digest"] for line in lines(workspace, run)] == [line["data/digest"] for line in lines(workspace, other)]
    assert saved_files(workspace, run) == saved_files(workspace, other)


@pytest.fixture(scope="module")
def runs_without(workspace, one):
    """Return, by layout, the name of the run that never had the samples of the poisoned step."""
    made = set()

    def run_without(layout):
        name, ((step, _),) = f"never {layout}", one[1].items()
        if name not in made:
            train(workspace, one[0], name, f"data.skip=[[{(step - 1) * BATCH}, {step * BATCH}]]", *LAYOUTS[layout])
            assert not spikes(workspace, name)
            made.add(name)
        return name

    return run_without


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS])
def test_a_run_that_goes_back_ends_as_the_run_that_never_had_the_samples(workspace, one, runs_without, layout):
    (file, steps), run = one, f"back {layout}"
    ((step, line),) = steps.items()
    shown = train(workspace, file, run, "guard.on_spike=rollback", *LAYOUTS[layout]).stdout
    (spike,) = spikes(workspace, run)
    first, place = (step - 1) * BATCH, f"{file.parent}/documents.jsonl: line {line}"
    assert (spike.step, spike.action, spike.samples) == (step, "rollback", ((first, first + BATCH),))
    assert place in [document.location for document in spike.worst[0].documents]
    assert f"; sample {spike.worst[0].sample} has the highest loss ({file.parent}/documents.jsonl: line " in shown
    assert "training goes back, and skips the samples of this step" in shown
    (event,) = [event for event in events(workspace, run) if event["event"] == "spike"]
    assert (event["step"], event["samples"], event["worst"][0]["sample"]) == (step, [[first, first + BATCH]], spike.worst[0].sample)
    assert_bitwise_equal(workspace, run, runs_without(layout))
    control = losses(workspace, run)
    assert len(control) == STEPS
    at = workspace.manta("data", "sample-at", run, str(step), "--json")
    assert json.loads(at.stdout)["digest"]["matches"], "the run's own config skips the samples"


@pytest.mark.slow
def test_a_run_that_stopped_at_a_spike_continues_without_its_samples(workspace, one, runs_without):
    (file, steps) = one
    stopped = train(workspace, file, "stop", "guard.on_spike=stop", code=1)
    assert "to continue without it, resume with guard.on_spike=rollback." in stopped.stderr
    assert [spike.action for spike in spikes(workspace, "stop")] == ["stop"]
    train(workspace, file, "stop", "guard.on_spike=rollback")
    assert [spike.action for spike in spikes(workspace, "stop")] == ["stop", "rollback"]
    assert_bitwise_equal(workspace, "stop", runs_without("data 2"))
    train(workspace, file, "stop", "train.steps=115")  # the user's own config, which does not name the samples
    assert [line["step"] for line in lines(workspace, "stop")] == list(range(1, 116))
    assert set(steps) == {spike.step for spike in spikes(workspace, "stop")}
    changed = workspace.manta("train", str(file), "run.dir=stop", "data.skip=[[0, 8]]")
    assert changed.returncode == 2
    assert "data.skip" in changed.stderr


@pytest.mark.slow
def test_a_crash_after_the_samples_were_recorded_changes_nothing(workspace, one, runs_without):
    (file, steps), home = one, workspace.directory / "crashed"
    ((step, _),) = steps.items()
    windows = Samples(RunDirectory(workspace.directory / runs_without("data 2")).prepared(), *configs_of(file), seed=0).train_windows
    epochs = (BATCH * STEPS + 0.5) / windows  # no sample more than the run has without going back
    once = f"data.sources=[{{path: {file.parent}/documents.jsonl, epochs: {epochs:.8f}}}]"
    with workspace.start("train", str(file), "run.dir=crashed", "guard.on_spike=rollback", once) as running:
        until = time.monotonic() + 120
        while not (home / "spikes.jsonl").exists() and time.monotonic() < until and running.poll() is None:
            time.sleep(0.005)
        running.kill()  # the controller and, with it, Ray
    train(workspace, file, "crashed", "guard.on_spike=rollback", once)
    assert [spike.step for spike in spikes(workspace, "crashed")] == [step]
    assert [event["step"] for event in events(workspace, "crashed") if event["event"] == "spike"] == [step]
    assert_bitwise_equal(workspace, "crashed", runs_without("data 2"))


@pytest.mark.slow
def test_an_update_that_is_skipped_is_skipped_again_after_a_resume(workspace, one):
    (file, steps) = one
    ((step, _),) = steps.items()
    train(workspace, file, "skip", "guard.on_spike=skip")
    train(workspace, file, "report")
    assert [spike.action for run in ("skip", "report") for spike in spikes(workspace, run)] == ["skip", "report"]
    assert [line["step"] for line in lines(workspace, "skip") if line.get("rejected")] == [step]
    skipped, reported = losses(workspace, "skip"), losses(workspace, "report")
    assert skipped[:step] == reported[:step]
    assert skipped[step] != reported[step], "the control: the update makes a difference"
    copy = copy_run(workspace, "skip", "skip again")
    for checkpoint in (copy / "checkpoints").glob("step-*"):
        if int(checkpoint.name[5:]) >= step:
            shutil.rmtree(checkpoint)
    assert list((copy / "checkpoints").glob("step-*"))
    resume(workspace, "skip again")
    assert losses(workspace, "skip again") == skipped
    assert saved_files(workspace, "skip again") == saved_files(workspace, "skip")


def test_a_run_goes_back_no_more_often_than_it_may(workspace, three):
    file, steps = three
    failed = train(workspace, file, "limit", "guard.on_spike=rollback", "guard.max_spikes=2", "guard.spike_deviations=8", code=1)
    found = spikes(workspace, "limit")
    assert [spike.action for spike in found] == ["rollback", "rollback", "stop"]
    lines_named = [document.location.rpartition(" ")[2] for spike in found for document in spike.worst[0].documents]
    assert {str(line) for line in steps.values()} <= set(lines_named)
    assert "These are more than guard.max_spikes (2) within 24 steps." in failed.stderr
    decisions = [event["decision"] for event in events(workspace, "limit") if event["event"] == "decided"]
    assert decisions == ["restart", "restart", "give up"]
