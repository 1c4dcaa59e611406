"""The models are the mathematics of their papers, whichever kernel computes it."""

from dataclasses import replace

import pytest
import torch
from parity import LENGTH, MODELS, VOCABULARY, batch, model, rows

from manta.data.errors import InputError
from manta.trainer.config.model import ModelConfig
from manta.trainer.dataloader.batch import IGNORED, Batch
from manta.trainer.model.bert import Bert
from manta.trainer.model.build import build_model
from manta.trainer.model.decoder import Decoder
from manta.trainer.model.transformer import Transformer
from manta.trainer.serve.generate import Sampling, generate, sample

CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp_width=64)
DECODERS = ["llama", "gpt2", "moe", "gpt2-moe"]


def llama(seed: int = 3, **changes) -> Decoder:
    made = build_model(CONFIG.model_copy(update=changes), vocabulary=200, sequence_length=64)
    made.initialize(seed)
    return made


def hidden(made: Transformer, given: Batch) -> torch.Tensor:
    found = made.hidden(given)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("name", DECODERS)
def test_no_token_of_a_decoder_sees_what_comes_after_it(name):
    made = model(name).eval()
    tokens = torch.randint(0, VOCABULARY, (1, 12))
    other = tokens.clone()
    other[0, 7:] = (other[0, 7:] + 1) % VOCABULARY
    ours, theirs = made.logits(tokens), made.logits(other)
    torch.testing.assert_close(ours[:, :7], theirs[:, :7])
    assert (ours[:, 7:] - theirs[:, 7:]).abs().max() > 1e-3


def test_a_token_of_an_encoder_sees_both_sides():
    made, given = model("bert").eval(), replace(batch("bert", 0), documents=None)
    changed = given.tokens.clone()
    changed[:, -1] = 5
    before, after = made.hidden(given), made.hidden(replace(given, tokens=changed))
    assert ((before - after).abs().amax(dim=-1) > 1e-6).all()


@pytest.mark.parametrize("name", MODELS)
def test_no_token_attends_across_a_document(name):
    made, given = model(name).eval(), batch(name, 0)
    documents = torch.arange(given.length).expand_as(given.tokens) // 8
    given = replace(given, documents=documents)
    changed = given.tokens.clone()
    changed[:, 8:16] = (changed[:, 8:16] + 1) % VOCABULARY
    moved = (hidden(made, given) - hidden(made, replace(given, tokens=changed))).abs().amax(dim=-1)
    assert moved[:, :8].max() < 1e-6, "experts have other rows beside these, which may round them otherwise"
    assert moved[:, 16:].max() < 1e-6
    assert moved[:, 8:16].min() > 0.1
    together = replace(given, documents=None)
    moved = (hidden(made, together) - hidden(made, replace(together, tokens=changed))).abs().amax(dim=-1)
    assert moved[:, 16:24].max() > 0.01, "the comparison would notice"


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_is_that_of_its_parts_however_the_batch_is_dealt_out(name):
    made, whole = model(name), batch(name, 0)
    divisors = made.counts(whole).float()
    at_once = made(whole, divisors)
    dealt = [made(rows(whole, numbers), divisors) for numbers in torch.arange(16).split(3)]
    torch.testing.assert_close(torch.stack(dealt).sum(dim=0), at_once, rtol=1e-5, atol=1e-6)
    assert torch.equal(sum(made.counts(rows(whole, numbers)) for numbers in torch.arange(16).split(3)), made.counts(whole))


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_each_loss_is_that_of_finite_differences(name):
    made = model(name).double()
    given = rows(batch(name, 0), [0, 3])
    divisors = made.counts(given).double()
    random = torch.Generator().manual_seed(0)
    for term in range(len(made.terms)):
        made.zero_grad()
        made(given, divisors)[term].backward()
        for key, parameter in made.named_parameters():
            if parameter.grad is None:
                continue
            direction = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            direction /= direction.norm()
            values = []
            with torch.no_grad():
                for step in (1e-5, -1e-5):
                    parameter.add_(direction, alpha=step)
                    values.append(made(given, divisors).clone())
                    parameter.sub_(direction, alpha=step)
            # the first term's gradient is that of itself and of the z-loss, which is told apart without one
            terms = [term] + [i for i, named in enumerate(made.terms) if term == 0 and named == "z_loss"]
            wanted = sum(float(values[0][i] - values[1][i]) for i in terms) / 2e-5
            if made.terms[term] == "z_loss":
                wanted = 0.0
            assert float((parameter.grad * direction).sum()) == pytest.approx(wanted, rel=1e-5, abs=1e-8), (made.terms[term], key)


def test_dropout_is_the_same_however_the_batch_is_dealt_out_and_another_for_another_sample():
    made, whole = model("gpt2").train(), batch("gpt2", 0)
    ours, _ = made.hidden(whole)
    part, _ = made.hidden(rows(whole, [5, 2]))
    torch.testing.assert_close(part, ours[[5, 2]])
    other, _ = made.hidden(replace(whole, keys=whole.keys + 1))
    assert (other - ours).abs().max() > 1e-3
    assert (made.eval().hidden(whole)[0] - ours).abs().max() > 1e-3


def test_padding_of_the_vocabulary_takes_no_part():
    made = model("llama")
    given = batch("llama", 0)
    before = made(given, made.counts(given))
    with torch.no_grad():
        made.head.weight[VOCABULARY:] += 100.0
    assert torch.equal(made(given, made.counts(given)), before)
    assert made.eval().logits(given.tokens).shape[-1] == VOCABULARY


def test_a_weight_s_first_value_depends_on_seed_and_name_alone():
    shallow, untied, other = llama(), llama(tied_head=False), llama(seed=4)
    name = "blocks.1.mlp.up_proj.weight"
    assert torch.equal(shallow.get_parameter(name), untied.get_parameter(name))
    assert not torch.equal(shallow.get_parameter(name), other.get_parameter(name))
    assert not torch.equal(shallow.get_parameter(name), shallow.get_parameter("blocks.0.mlp.up_proj.weight"))


def test_models_begin_as_their_papers_say():
    gpt2, bert = (build_model(MODELS[name], vocabulary=VOCABULARY, sequence_length=LENGTH) for name in ("gpt2", "bert"))
    for made in (gpt2, bert):
        made.initialize(seed=1)
    assert gpt2.get_parameter("blocks.0.mlp.up_proj.weight").detach().std().item() == pytest.approx(0.02, rel=0.05)
    assert gpt2.get_parameter("blocks.0.mlp.down_proj.weight").detach().std().item() == pytest.approx(
        0.02 / 2, rel=0.05
    )  # 1 / sqrt(2 layers)
    assert bert.get_parameter("blocks.0.mlp.down_proj.weight").abs().max() <= 0.04  # cut off at two deviations
    for made in (gpt2, bert):
        assert all((p == 0).all() for name, p in made.named_parameters() if name.endswith("bias"))
        assert all((p == 1).all() for name, p in made.named_parameters() if name.endswith("norm.weight"))


def test_an_untied_head_has_a_weight_of_its_own():
    tied, untied = llama(), llama(tied_head=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    assert untied.flops_per_token(64) == tied.flops_per_token(64)


def test_a_mixture_counts_the_flops_of_the_experts_that_a_token_uses():
    dense = ModelConfig(layers=2, width=64, heads=4, mlp_width=128)
    mixture = ModelConfig(layers=2, width=64, heads=4, experts={"experts": 8, "top_k": 2, "width": 64})
    made = [build_model(config, vocabulary=256, sequence_length=32) for config in (dense, mixture)]
    router = 6.0 * 2 * 8 * 64
    assert made[1].flops_per_token(32) == made[0].flops_per_token(32) + router


@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache_writes_what_it_would_without(name):
    made = model(name).eval()
    prompt = [5, 17, 99]
    tokens = list(generate(made, prompt, count=12, vocabulary=200, end=-1, sampling=Sampling(temperature=0)))
    slowly = list(prompt)
    for _ in range(12):
        slowly.append(int(made.logits(torch.tensor([slowly]))[0, -1, :200].argmax()))
    assert tokens == slowly[3:]


def test_generation_ends_with_the_document():
    made = llama().eval()
    first = next(generate(made, [1], count=1, vocabulary=200, end=-1, sampling=Sampling(temperature=0)))
    assert list(generate(made, [1], count=9, vocabulary=200, end=first, sampling=Sampling(temperature=0))) == []


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


def test_bert_predicts_masked_tokens_and_pairs_alone():
    made, given = model("bert"), batch("bert", 0)
    assert isinstance(made, Bert)
    masked = int((given.targets != IGNORED).sum())
    assert made.counts(given).tolist() == [masked, len(given.tokens), masked], "of masked language, next sentence and z-loss"
    nothing = replace(given, targets=torch.full_like(given.targets, IGNORED), next_sentence=None)
    assert made(nothing, torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


def test_an_embedding_smaller_than_the_tokenizer_is_refused():
    with pytest.raises(InputError, match=r"model.vocabulary: expected at least the tokenizer's 9, got 8"):
        build_model(CONFIG.model_copy(update={"vocabulary": 8}), vocabulary=9, sequence_length=32)
