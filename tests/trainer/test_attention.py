"""Who sees whom, whichever kernel computes it."""

import pytest
import torch
from torch.nn.attention import flex_attention

from manta.trainer.model import attention
from manta.trainer.model.attention import Cache, Visibility, attend

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7 + [2] * 8, [4] * 12 + [-1] * 8])  # the last of them is padding
LENGTH = DOCUMENTS.shape[1]
KERNELS = ["plain", "sdpa", "flex"]
LOOKS = [(causal, window, documents) for causal in (True, False) for window in (None, 3) for documents in (None, DOCUMENTS)]


@pytest.fixture
def kernel(monkeypatch):
    """Computes attention by the kernel of this name. FlexAttention is not compiled here: without a GPU it only then has a gradient."""

    def attend_by(name, q, k, v, visible, **how):
        monkeypatch.setattr(attention, "PLAIN_LIMIT", 0 if name == "sdpa" else 256)
        return attention._flex(q, k, v, visible) if name == "flex" else attend(q, k, v, visible, **how)

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_attention, "_WARNINGS_SHOWN", {"flex_attention_performance"})
    return attend_by


def draw(*, kv_heads=2, queries=LENGTH, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, queries, 16), (2, kv_heads, LENGTH, 16), (2, kv_heads, LENGTH, 16)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def seen_by_hand(causal, window, documents):
    """[2, LENGTH, LENGTH], from the words and not by tensor arithmetic."""

    def sees(b, i, j):
        near = window is None or (i - j < window and (causal or j - i < window))
        return near and not (causal and j > i) and (documents is None or documents[b, i] == documents[b, j])

    return torch.tensor([[[bool(sees(b, i, j)) for j in range(LENGTH)] for i in range(LENGTH)] for b in range(2)])


def by_the_paper(q, k, v, seen):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("bnth,bnsh->bnts", q, k) / q.shape[3] ** 0.5
    return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v


def reached(q, k, v, attended):
    """Which keys the output of each query moves with: [2, T, LENGTH]; a gradient that is no exact zero counts."""
    rows = []
    for i in range(q.shape[2]):
        grads = torch.autograd.grad(attended[:, :, i].square().sum(), (k, v), retain_graph=True)
        rows.append(sum((grad != 0).any(dim=3).any(dim=1) for grad in grads).bool())
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("causal", "window", "documents"), LOOKS)
def test_every_kernel_is_the_paper_s_softmax(name, kv_heads, causal, window, documents, kernel):
    inputs = draw(kv_heads=kv_heads)
    visible = Visibility(causal=causal, window=window, documents=documents)
    wanted = by_the_paper(*inputs, seen_by_hand(causal, window, documents))
    got = kernel(name, *inputs, visible)
    torch.testing.assert_close(got, wanted)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=wanted.dtype)
    for ours, theirs in zip(torch.autograd.grad(got, inputs, weight), torch.autograd.grad(wanted, inputs, weight), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_no_token_attends_across_a_document(name, causal, window, kernel):
    other_document = DOCUMENTS[:, :, None] != DOCUMENTS[:, None, :]
    inputs = draw()
    moved = reached(*inputs, kernel(name, *inputs, Visibility(causal=causal, window=window, documents=DOCUMENTS)))
    assert not (moved & other_document).any()
    assert torch.equal(moved, seen_by_hand(causal, window, DOCUMENTS))
    control = reached(*inputs, kernel(name, *inputs, Visibility(causal=causal, window=window)))
    assert (control & other_document).any()


@pytest.mark.parametrize("name", ["plain", "sdpa"])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(("causal", "window", "documents"), LOOKS)
def test_the_last_queries_see_what_they_would_among_all(name, queries, causal, window, documents, kernel):
    q, k, v = draw()
    visible = {"causal": causal, "window": window, "documents": documents}
    among_all = kernel(name, q, k, v, Visibility(**visible))
    alone = kernel(name, q[:, :, -queries:], k, v, Visibility(**visible))
    torch.testing.assert_close(alone, among_all[:, :, -queries:])


@pytest.mark.parametrize("name", ["plain", "sdpa"])
@pytest.mark.parametrize("window", [None, 3])
def test_token_by_token_with_a_cache_is_all_at_once(name, window, kernel):
    q, k, v = (x.detach() for x in draw())
    cache, parts = Cache(), []
    for part in (slice(0, 7), slice(7, 12), *(slice(i, i + 1) for i in range(12, LENGTH))):
        keys, values = cache.extend(k[:, :, part], v[:, :, part])
        parts.append(kernel(name, q[:, :, part], keys, values, Visibility(window=window)))
    torch.testing.assert_close(torch.cat(parts, dim=2), kernel(name, q, k, v, Visibility(window=window)))


@pytest.mark.parametrize("name", ["plain", "sdpa"])
def test_gradients_are_those_of_finite_differences(name, kernel):
    visible = Visibility(window=3, documents=DOCUMENTS)
    inputs = [x[..., :2].detach().requires_grad_() for x in draw()]
    assert torch.autograd.gradcheck(lambda *qkv: kernel(name, *qkv, visible), inputs, fast_mode=True)


def test_a_mask_is_drawn_once_for_all_layers():
    inputs = draw()
    visible = Visibility(documents=DOCUMENTS)
    attend(*inputs, visible)
    first = visible.mask(LENGTH, LENGTH, DOCUMENTS.device)
    attend(*inputs, visible)
    assert visible.mask(LENGTH, LENGTH, DOCUMENTS.device) is first
    assert visible.blocks(LENGTH, LENGTH, DOCUMENTS.device) is visible.blocks(LENGTH, LENGTH, DOCUMENTS.device)


def test_a_mask_drawn_ahead_is_the_one_that_layers_use():
    visible = Visibility(documents=DOCUMENTS)
    visible.draw(LENGTH, LENGTH, DOCUMENTS.device)
    ahead = visible._bias
    attend(*draw(dtype=torch.float32), visible)
    assert visible._bias is ahead
    unmasked = Visibility(causal=False, window=LENGTH)
    unmasked.draw(LENGTH, LENGTH, DOCUMENTS.device)
    assert unmasked._mask is None


def test_a_window_as_long_as_the_sequence_hides_nothing(kernel):
    inputs = draw()
    assert torch.equal(kernel("sdpa", *inputs, Visibility(window=LENGTH)), kernel("sdpa", *inputs, Visibility()))
    assert not torch.equal(kernel("sdpa", *inputs, Visibility(window=LENGTH - 1)), kernel("sdpa", *inputs, Visibility()))


@pytest.mark.parametrize("name", ["plain", "sdpa"])
def test_bf16_is_as_exact_as_its_inputs_allow(name, kernel):
    inputs = draw(dtype=torch.bfloat16)
    exact = by_the_paper(*(x.double() for x in inputs), seen_by_hand(True, None, DOCUMENTS))
    got = kernel(name, *inputs, Visibility(documents=DOCUMENTS))
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).norm() / exact.norm() < 2**-8


def test_dropout_of_the_weights_takes_the_plain_products_at_any_length(kernel):
    q, k, v = draw()
    kept = torch.rand(2, 4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.5
    got = kernel("sdpa", q, k, v, Visibility(documents=DOCUMENTS), dropout=lambda weights: weights * kept)
    scores = torch.einsum("bnth,bnsh->bnts", q, k.repeat_interleave(2, dim=1)) / 4
    weights = scores.masked_fill(~seen_by_hand(True, None, DOCUMENTS)[:, None], -torch.inf).softmax(-1)
    torch.testing.assert_close(got, (weights * kept) @ v.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("name", ["plain", "sdpa"])
@pytest.mark.parametrize(("causal", "window", "documents"), LOOKS)
def test_it_compiles_without_a_break(name, causal, window, documents, monkeypatch):
    monkeypatch.setattr(attention, "PLAIN_LIMIT", 0 if name == "sdpa" else 256)
    torch.compiler.reset()

    def layers(q, k, v):
        visible = Visibility(causal=causal, window=window, documents=documents)
        return attend(q, k, v, visible) + attend(q, k, v, visible)

    inputs = draw()
    torch.testing.assert_close(torch.compile(layers, fullgraph=True, backend="aot_eager")(*inputs), layers(*inputs))
