"""Validation: losses by source, perplexity, bits per byte and accuracy, as computed from scratch; the same on any number of ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_cases import write_sources
from spmd import spmd
from tokenizers import Tokenizer

from manta.cluster.protocol import HeartbeatWriter
from manta.data.objectives.examples import IGNORED
from manta.data.prepare.prepare import prepare
from manta.data.sampling.samples import Samples
from manta.trainer.config.training import TrainingConfig
from manta.trainer.dataloader.batch import Batch
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.engine.token_sums import TokenSums
from manta.trainer.loop import Loop
from manta.trainer.model.build import build_model

COUNT = 21  # validation samples: the last batch is filled up
MODELS = {
    "gpt2": {"model": {"family": "gpt2"}},
    "llama": {"model": {"kv_heads": 2, "logit_soft_cap": 5.0, "label_smoothing": 0.1, "z_loss": 0.001}},
    "bert": {"model": {"family": "bert"}, "data": {"objective": "masked"}, "tokenizer": {"algorithm": "wordpiece"}},
}


def config_of(folder: Path, algorithm: str, model: str = "gpt2", *, batch: int = 4, **parallel: int) -> TrainingConfig:
    more = MODELS[model]
    sources = {"web": str(folder / "web"), "code": str(folder / "code.jsonl")}
    data = {"sources": sources, "directory": str(folder / "corpora"), "sequence_length": 16, "validation": 0.3, "workers": 1}
    return TrainingConfig.model_validate(
        {
            "run": {"dir": str(folder / "run")},
            "data": data | more.get("data", {}),
            "tokenizer": {"vocabulary": 400, "train_bytes": 100_000, "algorithm": algorithm} | more.get("tokenizer", {}),
            "model": {"layers": 1, "width": 16, "heads": 2, "mlp_width": 32} | more["model"],
            "train": {"steps": 2, "global_batch": 8, "micro_batch": batch},
            "evaluate": {"samples": COUNT},
            "track": {"sources_every_steps": 1},
            "parallel": {"zero": 1} | parallel,
            "optimizer": {"learning_rate": 0.05},
        }
    )


def open_loop(config: TrainingConfig, samples: Samples, *, precise: bool = False) -> Loop:
    """precise: compute in fp64."""
    world = World.from_environment()
    layout = layout_for(config.train, config.parallel, world.size)
    model = build_model(config.model, vocabulary=samples.tokenizer_vocabulary, sequence_length=16)
    model.initialize(3)
    engine = Engine(model, mesh=world.mesh(layout), optimizer=config.optimizer, precision="fp32")
    if precise:
        engine.module.double()
    missing = dict.fromkeys(("run_dir", "stop", "saver", "guard", "metrics"))
    return Loop(
        config=config, world=world, samples=samples, engine=engine, heartbeat=HeartbeatWriter(None), flops_per_token={16: 1.0}, **missing
    )


def evaluated(config: TrainingConfig) -> dict:
    return open_loop(config, open_samples(config), precise=True).evaluation.run(config.train.steps)


def trained(config: TrainingConfig) -> tuple[list[float], float, float]:
    """Return the training loss of each source in a step, their mean over all targets, and the loss."""
    loop = open_loop(config, open_samples(config))
    sums = TokenSums(2, loop.samples.token_bytes)
    terms_K = loop.engine.accumulate(list(loop._read(0)[0]), sums)
    terms = loop.engine.update(terms_K, learning_rate=0.0).terms
    *terms, targets, other_targets, loss, other_loss = loop.world.sum([*terms.tolist(), *sums.values[:2].flat])
    return (
        [loss / targets, other_loss / other_targets],
        (loss + other_loss) / (targets + other_targets),
        terms[0] / loop.engine.layout.tensor,
    )


def open_samples(config: TrainingConfig) -> Samples:
    return Samples(prepare(config.data, config.tokenizer), config.data, config.tokenizer, seed=1)


def from_scratch(config: TrainingConfig) -> dict:
    """Compute the same with numpy, from logits and from the text that tokens spell."""
    samples = open_samples(config)
    model = open_loop(config, samples, precise=True).engine.module.eval()
    (file,) = Path(config.data.directory).rglob("tokenizer.json")
    names = {token: name for name, token in Tokenizer.from_file(str(file)).get_vocab().items()}
    special = {added["id"] for added in json.loads(file.read_text())["added_tokens"]}
    values: dict[str, list] = {"nats": [], "bytes": [], "source": [], "correct": []}
    for index in range(COUNT):
        examples = samples.validation(np.array([index]))
        logits_TV = logits_of(model, examples)
        for logits_V, target in zip(logits_TV, examples.targets[0].tolist(), strict=True):
            if target == IGNORED:
                continue
            values["nats"].append(np.log(np.exp(logits_V - logits_V.max()).sum()) - (logits_V[target] - logits_V.max()))
            values["bytes"].append(0 if target in special else len(names[target].removeprefix("##")))  # all of its text is ASCII
            values["source"].append(int(examples.sources[0]))
            values["correct"].append(logits_V.argmax() == target)
    nats, size, source, correct = (np.array(column) for column in values.values())
    assert set(source.tolist()) == {0, 1}
    assert (size == 0).any() == (config.data.objective == "causal"), "some targets are special tokens"

    def bits(where) -> float:
        text = where & (size > 0)
        return nats[text].sum() / np.log(2) / size[text].sum()

    everything = np.ones_like(nats, dtype=bool)
    expected = {"eval/perplexity": np.exp(nats.mean()), "eval/bits_per_byte": bits(everything), "mean": nats.mean()}
    for number, name in enumerate(("web", "code")):
        expected |= {f"eval/loss/{name}": nats[source == number].mean(), f"eval/bits_per_byte/{name}": bits(source == number)}
    expected["accuracy"] = correct.mean()
    expected["shares"] = [(source == number).mean() for number in (0, 1)]
    return expected


def logits_of(model, examples) -> np.ndarray:
    batch = Batch.from_examples(examples, seed=1)
    with torch.no_grad():
        found = model.logits(batch.tokens) if examples.segments is None else model.logits(batch)[0]
    return found[0].numpy()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("algorithm", "model"),
    [("bpe", "gpt2"), pytest.param("unigram", "llama", marks=SLOW), pytest.param("wordpiece", "gpt2", marks=SLOW), ("wordpiece", "bert")],
)
def test_validation_equals_a_computation_from_scratch_on_one_rank_and_on_four(tmp_path, algorithm, model):
    config = config_of(write_sources(tmp_path), algorithm, model)
    prepare(config.data, config.tokenizer)
    expected = spmd(from_scratch, 1, config)[0]
    shares, mean, accuracy = expected.pop("shares"), expected.pop("mean"), expected.pop("accuracy")
    for ranks in (1, 4):
        line, *others = spmd(evaluated, ranks, config_of(tmp_path, algorithm, model, batch=8 // ranks))
        assert all(other == line for other in others)
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, abs=1e-9, rel=1e-9), key
        key = "eval/masked_language" if model == "bert" else "eval/loss"
        assert line[key] == pytest.approx(mean, rel=1e-9)
        assert shares[0] * line["eval/loss/web"] + shares[1] * line["eval/loss/code"] == pytest.approx(line[key], rel=1e-9)
        assert line.get("eval/accuracy") == (pytest.approx(accuracy) if model == "bert" else None)


@pytest.mark.parametrize(
    "parallel",
    [pytest.param({"zero": 3}, marks=SLOW), pytest.param({"tensor": 2}, marks=SLOW), {"sequence": 2}, {"tensor": 2, "zero": 2}],
)
def test_training_losses_by_source_are_the_same_under_every_layout(tmp_path, parallel):
    write_sources(tmp_path)
    config = config_of(tmp_path, "bpe", "llama")
    prepare(config.data, config.tokenizer)
    by_source, mean, loss = spmd(trained, 1, config)[0]
    assert mean == pytest.approx(loss, rel=1e-6)
    assert by_source[0] != pytest.approx(by_source[1], rel=1e-4)
    for found, found_mean, found_loss in spmd(trained, 4, config_of(tmp_path, "bpe", "llama", batch=1, **parallel)):
        assert found == pytest.approx(by_source, rel=1e-6)
        assert (found_mean, found_loss) == pytest.approx((mean, loss), rel=1e-6)
