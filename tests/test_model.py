"""The model is the mathematics of its papers, whichever kernel computes it."""

import pytest
import torch
import torch.nn.functional as F

from manta.trainer.config import ModelConfig
from manta.trainer.generate import Sampling, draw, generate
from manta.trainer.model import losses
from manta.trainer.model.attention import attend
from manta.trainer.model.gpt import GPT, flops_per_token

CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp_width=64)


def build(seed: int = 3, **changes) -> GPT:
    model = GPT(CONFIG.model_copy(update=changes), vocabulary=200)
    model.initialize(seed)
    return model


@pytest.mark.parametrize("chunk", [1, 7, 50, 256])
def test_the_chunked_loss_and_its_gradients_are_those_of_softmax(chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(losses, "LEAST", chunk)
    torch.manual_seed(0)
    x, weight = torch.randn(50, 16, dtype=torch.float64), torch.randn(256, 16, dtype=torch.float64)
    targets = torch.randint(0, 256, (50,))
    got, wanted = [], []
    for loss, values in ((losses.cross_entropy, got), (lambda x, w, t: F.cross_entropy(x @ w.T, t), wanted)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        value = loss(*leaves, targets)
        (value * 3).backward()
        values += [value.detach().double(), *(leaf.grad for leaf in leaves)]
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (1, 16), (5, 16)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_plain_attention_and_sdpa_agree(queries, keys, kv_heads, monkeypatch):
    torch.manual_seed(0)
    q = torch.randn(2, 4, queries, 8)
    k, v = torch.randn(2, kv_heads, keys, 8), torch.randn(2, kv_heads, keys, 8)
    plain = attend(q, k, v)
    monkeypatch.setattr("manta.trainer.model.attention.PLAIN_LIMIT", 0)
    torch.testing.assert_close(attend(q, k, v), plain)


def test_no_token_sees_what_comes_after_it():
    model = build()
    tokens = torch.randint(0, 200, (1, 12))
    other = tokens.clone()
    other[0, 7:] = (other[0, 7:] + 1) % 200
    ours, theirs = model.logits(tokens), model.logits(other)
    torch.testing.assert_close(ours[:, :7], theirs[:, :7])
    assert (ours[:, 7:] - theirs[:, 7:]).abs().max() > 1e-3


def test_a_weight_s_first_value_depends_on_seed_and_name_alone():
    shallow, deep, other = build(), build(layers=2, tied_head=False), build(seed=4)
    name = "layers.1.mlp.up_proj.weight"
    assert torch.equal(shallow.get_parameter(name), deep.get_parameter(name))
    assert not torch.equal(shallow.get_parameter(name), other.get_parameter(name))
    assert not torch.equal(shallow.get_parameter(name), shallow.get_parameter("layers.0.mlp.up_proj.weight"))


def test_an_untied_head_has_a_weight_of_its_own():
    tied, untied = build(), build(tied_head=False)
    assert tied.head_weight is tied.embedding.weight
    assert untied.head_weight is not untied.embedding.weight
    assert flops_per_token(untied, 64) == flops_per_token(tied, 64)


def test_generation_with_a_cache_writes_what_it_would_without():
    model = build().eval()
    prompt = [5, 17, 99]
    tokens = list(generate(model, prompt, count=12, vocabulary=200, end=-1, sampling=Sampling(temperature=0)))
    slowly = list(prompt)
    for _ in range(12):
        slowly.append(int(model.logits(torch.tensor([slowly]))[0, -1, :200].argmax()))
    assert tokens == slowly[3:]


def test_generation_ends_with_the_document():
    model = build().eval()
    first = next(generate(model, [1], count=1, vocabulary=200, end=-1, sampling=Sampling(temperature=0)))
    assert list(generate(model, [1], count=9, vocabulary=200, end=first, sampling=Sampling(temperature=0))) == []


def test_top_k_and_top_p_leave_out_the_unlikely():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(**how) -> set[int]:
        return {draw(logits, Sampling(temperature=1.0, **how), generator) for _ in range(200)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=1) == {0}
    assert drawn(top_p=0.4) == {0}
    assert drawn(top_p=0.85) == {0, 1, 2}
    assert draw(logits, Sampling(temperature=0), generator) == 0
