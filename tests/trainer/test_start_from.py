"""A run starts from the weights of another run or of an import, to continue training or to fine-tune."""

import json
import shutil

import numpy as np
import old_run
import pytest
import torch
from fuzz import manta

from manta.data.sampling.samples import Samples
from manta.data.tokenizer.tokenizer import read_vocabulary
from manta.trainer.checkpoint import catalog
from manta.trainer.dataloader.batch import IGNORED
from manta.trainer.run_directory import RunDirectory


@pytest.fixture(scope="module")
def gpt2(workspace, tmp_path_factory):
    """GPT-2 as transformers saves it, with the small corpus's own tokenizer, imported by the command; and transformers' own model."""
    from tokenizers import Tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(next((workspace.directory / "corpora").glob("**/tokenizer.json"))))
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=tokenizer.get_vocab_size(), n_positions=48, n_embd=64, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config).eval()
    directory = tmp_path_factory.mktemp("theirs") / "gpt2"
    model.save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(directory)
    done = workspace.manta("import", str(directory), "--output", "imported/gpt2")
    assert done.returncode == 0, done.stderr
    return model


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel.zero=3", "parallel.tensor=2", "parallel={zero: 3, tensor: 2}"])
def test_an_imported_gpt2_starts_with_the_loss_of_transformers(workspace, gpt2, layout):
    overrides = [
        "run.start_from=imported/gpt2",
        "model={preset: imported/gpt2/model.yaml, dropout: 0, attention_dropout: 0}",
        "tokenizer={file: imported/gpt2/tokenizer.json}",
        "train.steps=3",
        layout,
    ]
    run = f"from gpt2 {layout}"
    workspace.train(run, *overrides)
    home = RunDirectory(workspace.directory / run)
    first, *_, last = [json.loads(line) for line in home.metrics_file.read_text().splitlines()]
    config = home.config()
    samples = Samples(home.prepared(), config.data, config.tokenizer, seed=config.run.seed)
    examples = samples.train(np.arange(config.train.global_batch))
    assert not (examples.targets == IGNORED).any()
    with torch.no_grad():
        logits = gpt2(torch.from_numpy(examples.tokens)).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(examples.targets).flatten())
    assert first["train/loss"] == pytest.approx(float(theirs), rel=2e-6)
    assert last["train/loss"] < first["train/loss"]
    assert "started from the weights of" in (workspace.directory / run / "logs/attempt-0001/rank-0000.log").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("gpt2")
def test_weights_of_another_tokenizer_are_reported(workspace):
    preset = "model={preset: imported/gpt2/model.yaml}"
    done = workspace.manta(
        "train",
        str(workspace.config_file),
        "run.dir=never said",
        "run.start_from=imported/gpt2",
        "tokenizer.vocabulary=300",
        "train.steps=2",
        preset,
    )
    file = workspace.directory / "imported/gpt2/tokenizer.json"
    assert f"run.start_from: the weights were trained with another tokenizer. To use theirs, set tokenizer.file={file};" in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("gpt2")
def test_a_larger_vocabulary_keeps_the_rows_of_its_old_tokens(workspace):
    """The tokenizer gets new tokens, and its numbers another order: each old token has its own row all the same."""
    import_of = workspace.directory / "imported/gpt2"
    spec = json.loads((import_of / "tokenizer.json").read_text())
    there = read_vocabulary(import_of / "tokenizer.json")
    names = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    special = [added["content"] for added in spec["added_tokens"]]
    kept = [name for name in names if name not in special]
    order = [*special, *kept[100:], *kept[:100], *(f"new{number}" for number in range(70))]
    spec["model"]["vocab"] = {name: number for number, name in enumerate(order)}
    for added in spec["added_tokens"]:
        added["id"] = order.index(added["content"])
    grown = workspace.directory / "grown.json"
    grown.write_text(json.dumps(spec))
    model = "model={preset: imported/gpt2/model.yaml, vocabulary: null, dropout: 0, attention_dropout: 0}"
    frozen = ("optimizer.learning_rate=1e-12", "train.steps=1", f"tokenizer={{file: {json.dumps(str(grown))}}}", model)
    refused = workspace.train("not grown", *frozen, "--weights-only", "imported/gpt2", code=2)
    assert "embedding.weight: expected" in refused.stderr
    done = workspace.train("grown", *frozen, "--weights-only", "imported/gpt2", "run.match_tokens=true", "parallel.zero=3")
    assert f"run.match_tokens: {len(there):,} of {len(order):,} tokens have a row in the weights, 70 are initialized" in done.stderr
    (_, ours), (_, theirs) = (
        catalog.load_newest_weights(RunDirectory(workspace.directory / run).open_checkpoints()) for run in ("grown", "imported/gpt2")
    )
    rows = torch.tensor([there[name] for name in order[:-70]])
    assert torch.allclose(ours["embedding.weight"][: len(rows)], theirs["embedding.weight"][rows], atol=1e-6)
    new_rows = ours["embedding.weight"][len(rows) : len(order)]
    assert 0.01 < float(new_rows.std()) < 0.03, "as in a new run"
    same = [name for name in theirs if not name.startswith("embedding.")]
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in same)
    lost = workspace.directory / "imported/lost"
    shutil.copytree(import_of, lost)
    (lost / "tokenizer.json").unlink()
    refused = workspace.train("lost", *frozen, "--weights-only", "imported/lost", "run.match_tokens=true", code=2)
    assert "run.match_tokens: expected weights in RUN/checkpoints" in refused.stderr


def test_missing_weights_are_reported_before_the_run_starts(workspace):
    done = workspace.manta("train", str(workspace.config_file), "run.dir=never", "run.start_from=nowhere")
    assert done.returncode == 2
    assert "run.start_from: expected" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (workspace.directory / "never").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("gpt2")
def test_weights_of_another_model_are_refused_before_the_run_starts(workspace):
    done = workspace.manta("train", str(workspace.config_file), "run.dir=from another", "run.start_from=imported/gpt2")
    assert done.returncode == 2
    assert "run.start_from:" in done.stderr
    assert "blocks.0.attention_norm.weight: expected" not in done.stderr, "both have that one"
    assert "Set model to the model that was trained" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2  # that it was trained as another one, too
    assert not (workspace.directory / "from another").exists()


def test_weights_of_another_shape_are_refused_before_the_corpus_is_prepared(workspace, monkeypatch):
    monkeypatch.chdir(workspace.directory)
    start = f"run.start_from={old_run.HERE}/workspace/run"
    outcome = manta("train", workspace.config_file.name, "run.dir=never", start, "data.directory=unprepared", seconds=60)
    assert outcome.code == 2
    assert "Set model to the model that was trained, or name other weights." in outcome.stderr
    assert not (workspace.directory / "unprepared").exists()


@pytest.mark.slow
def test_weights_of_a_deeper_model_are_refused(workspace):
    workspace.train("deeper", "model.layers=3", "train.steps=1")
    done = workspace.manta("train", str(workspace.config_file), "run.dir=shallower", "run.start_from=deeper")
    assert done.returncode == 2
    assert "blocks.2.attention.k_proj.weight: expected nothing, got (32, 64)" in done.stderr
    assert not (workspace.directory / "shallower").exists()
    # A checkpoint copied out of its run works too; its tokenizer is unknown then.
    alone = workspace.directory / "kept aside/step-00000001"
    shutil.copytree(workspace.directory / "deeper/checkpoints/step-00000001", alone)
    done = workspace.train("as deep", "model.layers=3", "train.steps=2", f"run.start_from={alone}")
    assert "cannot compare tokenizers" in done.stderr


def test_a_transformers_directory_must_be_imported_first(workspace, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = workspace.manta("train", str(workspace.config_file), "run.dir=never", f"run.start_from={tmp_path}")
    assert done.returncode == 2
    assert f"Import it first: manta import {tmp_path}" in done.stderr
