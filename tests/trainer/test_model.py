"""The models follow their papers."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity import LENGTH, MODELS, VOCABULARY, batch, model, rows

from manta.data.errors import InputError
from manta.trainer.config.model import ModelConfig
from manta.trainer.dataloader.batch import IGNORED, Batch
from manta.trainer.model import bert
from manta.trainer.model.bert import Bert
from manta.trainer.model.build import build_model
from manta.trainer.model.decoder import Decoder
from manta.trainer.model.transformer import Transformer
from manta.trainer.serve.generate import Sampling, generate, sample

CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp_width=64)
DECODERS = ["llama", "gpt2", "moe", "gpt2-moe"]


def llama(seed: int = 3, **changes) -> Decoder:
    built = build_model(CONFIG.model_copy(update=changes), vocabulary=200, sequence_length=64)
    built.initialize(seed)
    return built


def hidden(built: Transformer, batch: Batch) -> torch.Tensor:
    states = built.hidden(batch)
    return states[0] if isinstance(states, tuple) else states


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_do_not_attend_to_later_tokens(name):
    built = model(name).eval()
    tokens = torch.randint(0, VOCABULARY, (1, 12))
    other = tokens.clone()
    other[0, 7:] = (other[0, 7:] + 1) % VOCABULARY
    ours, theirs = built.logits(tokens), built.logits(other)
    torch.testing.assert_close(ours[:, :7], theirs[:, :7])
    assert (ours[:, 7:] - theirs[:, 7:]).abs().max() > 1e-3


def test_encoders_attend_to_both_sides():
    built, given = model("bert").eval(), replace(batch("bert", 0), documents=None)
    changed = given.tokens.clone()
    changed[:, -1] = 5
    before, after = built.hidden(given), built.hidden(replace(given, tokens=changed))
    assert ((before - after).abs().amax(dim=-1) > 1e-6).all()


@pytest.mark.parametrize("name", MODELS)
def test_no_token_attends_across_a_document(name):
    built, given = model(name).eval(), batch(name, 0)
    documents = torch.arange(given.length).expand_as(given.tokens) // 8
    given = replace(given, documents=documents)
    changed = given.tokens.clone()
    changed[:, 8:16] = (changed[:, 8:16] + 1) % VOCABULARY
    moved = (hidden(built, given) - hidden(built, replace(given, tokens=changed))).abs().amax(dim=-1)
    assert moved[:, :8].max() < 1e-6, "rounding differs, since experts multiply other rows together"
    assert moved[:, 16:].max() < 1e-6
    assert moved[:, 8:16].min() > 0.1
    together = replace(given, documents=None)
    moved = (hidden(built, together) - hidden(built, replace(together, tokens=changed))).abs().amax(dim=-1)
    assert moved[:, 16:24].max() > 0.01, "the comparison would detect it"


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_is_the_sum_over_any_split_of_the_batch(name):
    built, whole = model(name), batch(name, 0)
    divisors = built.counts(whole).float()
    expected = built(whole, divisors)
    parts = [built(rows(whole, numbers), divisors) for numbers in torch.arange(16).split(3)]
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(sum(built.counts(rows(whole, numbers)) for numbers in torch.arange(16).split(3)), built.counts(whole))


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_each_loss_term_matches_finite_differences(name):
    built = model(name).double()
    given = rows(batch(name, 0), [0, 3])
    divisors = built.counts(given).double()
    random = torch.Generator().manual_seed(0)
    for term in range(len(built.terms)):
        built.zero_grad()
        built(given, divisors)[term].backward()
        for key, parameter in built.named_parameters():
            if parameter.grad is None:
                continue
            direction = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            direction /= direction.norm()
            values = []
            with torch.no_grad():
                for step in (1e-5, -1e-5):
                    parameter.add_(direction, alpha=step)
                    values.append(built(given, divisors).clone())
                    parameter.sub_(direction, alpha=step)
            # the first term's gradient includes the z-loss's; the z-loss term itself is detached
            terms = [term] + [i for i, named in enumerate(built.terms) if term == 0 and named == "z_loss"]
            wanted = sum(float(values[0][i] - values[1][i]) for i in terms) / 2e-5
            if built.terms[term] == "z_loss":
                wanted = 0.0
            assert float((parameter.grad * direction).sum()) == pytest.approx(wanted, rel=1e-5, abs=1e-8), (built.terms[term], key)


def test_dropout_depends_on_the_sample_and_not_on_the_batch():
    built, whole = model("gpt2").train(), batch("gpt2", 0)
    states, _ = built.hidden(whole)
    part, _ = built.hidden(rows(whole, [5, 2]))
    torch.testing.assert_close(part, states[[5, 2]])
    other, _ = built.hidden(replace(whole, keys=whole.keys + 1))
    assert (other - states).abs().max() > 1e-3
    assert (built.eval().hidden(whole)[0] - states).abs().max() > 1e-3


def test_vocabulary_padding_does_not_affect_the_loss():
    built = model("llama")
    given = batch("llama", 0)
    before = built(given, built.counts(given))
    with torch.no_grad():
        built.head.weight[VOCABULARY:] += 100.0
    assert torch.equal(built(given, built.counts(given)), before)
    assert built.eval().logits(given.tokens).shape[-1] == VOCABULARY


def test_initial_weights_depend_only_on_seed_and_name():
    shallow, untied, other = llama(), llama(tied_head=False), llama(seed=4)
    name = "blocks.1.mlp.up_proj.weight"
    assert torch.equal(shallow.get_parameter(name), untied.get_parameter(name))
    assert not torch.equal(shallow.get_parameter(name), other.get_parameter(name))
    assert not torch.equal(shallow.get_parameter(name), shallow.get_parameter("blocks.0.mlp.up_proj.weight"))


def test_initial_weights_follow_the_papers():
    gpt2, bert = (build_model(MODELS[name], vocabulary=VOCABULARY, sequence_length=LENGTH) for name in ("gpt2", "bert"))
    for built in (gpt2, bert):
        built.initialize(seed=1)
    assert gpt2.get_parameter("blocks.0.mlp.up_proj.weight").detach().std().item() == pytest.approx(0.02, rel=0.05)
    assert gpt2.get_parameter("blocks.0.mlp.down_proj.weight").detach().std().item() == pytest.approx(
        0.02 / 2, rel=0.05
    )  # 1 / sqrt(2 layers)
    assert bert.get_parameter("blocks.0.mlp.down_proj.weight").abs().max() <= 0.04  # truncated at two deviations
    for built in (gpt2, bert):
        assert all((p == 0).all() for name, p in built.named_parameters() if name.endswith("bias"))
        assert all((p == 1).all() for name, p in built.named_parameters() if name.endswith("norm.weight"))


def test_an_untied_head_has_a_separate_weight():
    tied, untied = llama(), llama(tied_head=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    assert untied.flops_per_token(64) == tied.flops_per_token(64)


def test_a_mixtures_flops_count_only_the_experts_a_token_uses():
    dense = ModelConfig(layers=2, width=64, heads=4, mlp_width=128)
    mixture = ModelConfig(layers=2, width=64, heads=4, experts={"experts": 8, "top_k": 2, "width": 64})
    built = [build_model(config, vocabulary=256, sequence_length=32) for config in (dense, mixture)]
    router = 6.0 * 2 * 8 * 64
    assert built[1].flops_per_token(32) == built[0].flops_per_token(32) + router


@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache_writes_what_it_would_without(name):
    built = model(name).eval()
    prompt = [5, 17, 99]
    tokens = list(generate(built, prompt, count=12, vocabulary=200, end=-1, sampling=Sampling(temperature=0)))
    slowly = list(prompt)
    for _ in range(12):
        slowly.append(int(built.logits(torch.tensor([slowly]))[0, -1, :200].argmax()))
    assert tokens == slowly[3:]


def test_generation_ends_with_the_document():
    built = llama().eval()
    first = next(generate(built, [1], count=1, vocabulary=200, end=-1, sampling=Sampling(temperature=0)))
    assert list(generate(built, [1], count=9, vocabulary=200, end=first, sampling=Sampling(temperature=0))) == []


def test_top_k_and_top_p_leave_out_the_unlikely():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(**how) -> set[int]:
        return {sample(logits, Sampling(temperature=1.0, **how), generator) for _ in range(200)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=1) == {0}
    assert drawn(top_p=0.4) == {0}
    assert drawn(top_p=0.85) == {0, 1, 2}
    assert sample(logits, Sampling(temperature=0), generator) == 0
    assert sample(logits, Sampling(temperature=1e-40), generator) == 0


def test_bert_predicts_only_masked_tokens_and_pairs():
    built, given = model("bert"), batch("bert", 0)
    assert isinstance(built, Bert)
    masked = int((given.targets != IGNORED).sum())
    assert built.counts(given).tolist() == [masked, len(given.tokens), masked], "of masked language, next sentence and z-loss"
    nothing = replace(given, targets=torch.full_like(given.targets, IGNORED), next_sentence=None)
    assert built(nothing, torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


def test_an_embedding_smaller_than_the_tokenizer_is_refused():
    with pytest.raises(InputError, match=r"model.vocabulary: expected at least the tokenizer's 9, got 8"):
        build_model(CONFIG.model_copy(update={"vocabulary": 8}), vocabulary=9, sequence_length=32)


def test_models_import_no_collectives():
    sources = list(Path(bert.__file__).parent.glob("*.py"))
    assert len(sources) > 8
    assert [source.name for source in sources if re.search(r"torch\.distributed|torch import distributed", source.read_text())] == []
