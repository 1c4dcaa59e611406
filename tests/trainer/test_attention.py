"""Every attention kernel applies the same mask."""

import pytest
import torch
from torch.nn.attention import flex_attention

from manta.trainer.model import attention
from manta.trainer.model.attention import AttentionMask, KVCache, attend

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7 + [2] * 8, [4] * 12 + [-1] * 8])  # the last one is padding
LENGTH = DOCUMENTS.shape[1]
KERNELS = ["matmul", "sdpa", "flex"]
MASKS = [(causal, window, documents) for causal in (True, False) for window in (None, 3) for documents in (None, DOCUMENTS)]


@pytest.fixture
def kernel(monkeypatch):
    """Compute attention with the named kernel. FlexAttention is not compiled here: without a GPU only then has it a gradient."""

    def attend_with(name, q, k, v, mask, **options):
        monkeypatch.setattr(attention, "MATMUL_LIMIT", 0 if name == "sdpa" else 256)
        return attention._flex_attention(q, k, v, mask) if name == "flex" else attend(q, k, v, mask, **options)

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_attention, "_WARNINGS_SHOWN", {"flex_attention_performance"})
    return attend_with


def random_inputs(*, kv_heads=2, queries=LENGTH, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, queries, 16), (2, kv_heads, LENGTH, 16), (2, kv_heads, LENGTH, 16)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def mask_of(queries=LENGTH, **options) -> AttentionMask:
    return AttentionMask(queries, LENGTH, DOCUMENTS.device, **options)


def expected_mask(causal, window, documents):
    """Return the mask [2, LENGTH, LENGTH] by its definition, without tensor arithmetic."""

    def attends(b, i, j):
        in_reach = window is None or (i - j < window and (causal or j - i < window))
        return in_reach and not (causal and j > i) and (documents is None or documents[b, i] == documents[b, j])

    return torch.tensor([[[bool(attends(b, i, j)) for j in range(LENGTH)] for i in range(LENGTH)] for b in range(2)])


def reference(q, k, v, mask):
    """Attention as the paper writes it."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("bnth,bnsh->bnts", q, k) / q.shape[3] ** 0.5
    return scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ v


def attended_keys(q, k, v, output):
    """Return which keys each query's output depends on, [2, T, LENGTH]: those with a gradient other than exactly zero."""
    rows = []
    for i in range(q.shape[2]):
        grads = torch.autograd.grad(output[:, :, i].square().sum(), (k, v), retain_graph=True)
        rows.append(sum((grad != 0).any(dim=3).any(dim=1) for grad in grads).bool())
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("causal", "window", "documents"), MASKS)
def test_every_kernel_equals_the_paper(name, kv_heads, causal, window, documents, kernel):
    inputs = random_inputs(kv_heads=kv_heads)
    expected = reference(*inputs, expected_mask(causal, window, documents))
    output = kernel(name, *inputs, mask_of(causal=causal, window=window, documents=documents))
    torch.testing.assert_close(output, expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    grads, expected_grads = (torch.autograd.grad(value, inputs, weight) for value in (output, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_no_token_attends_across_a_document(name, causal, window, kernel):
    other_document = DOCUMENTS[:, :, None] != DOCUMENTS[:, None, :]
    inputs = random_inputs()
    attended = attended_keys(*inputs, kernel(name, *inputs, mask_of(causal=causal, window=window, documents=DOCUMENTS)))
    assert not (attended & other_document).any()
    assert torch.equal(attended, expected_mask(causal, window, DOCUMENTS))
    control = attended_keys(*inputs, kernel(name, *inputs, mask_of(causal=causal, window=window)))
    assert (control & other_document).any()


@pytest.mark.parametrize("name", ["matmul", "sdpa"])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(("causal", "window", "documents"), MASKS)
def test_the_last_queries_alone_get_the_same_output(name, queries, causal, window, documents, kernel):
    q, k, v = random_inputs()
    options = {"causal": causal, "window": window, "documents": documents}
    whole = kernel(name, q, k, v, mask_of(**options))
    last = kernel(name, q[:, :, -queries:], k, v, mask_of(queries, **options))
    torch.testing.assert_close(last, whole[:, :, -queries:])


@pytest.mark.parametrize("name", ["matmul", "sdpa"])
@pytest.mark.parametrize("window", [None, 3])
def test_a_cache_gives_the_output_of_the_whole_sequence(name, window, kernel):
    q, k, v = (x.detach() for x in random_inputs())
    cache, outputs = KVCache(), []
    for new in (slice(0, 7), slice(7, 12), *(slice(i, i + 1) for i in range(12, LENGTH))):
        keys, values = cache.append(k[:, :, new], v[:, :, new])
        outputs.append(kernel(name, q[:, :, new], keys, values, AttentionMask(new.stop - new.start, new.stop, q.device, window=window)))
    torch.testing.assert_close(torch.cat(outputs, dim=2), kernel(name, q, k, v, mask_of(window=window)))


@pytest.mark.parametrize("name", ["matmul", "sdpa"])
def test_gradients_match_finite_differences(name, kernel):
    mask = mask_of(window=3, documents=DOCUMENTS)
    inputs = [x[..., :2].detach().requires_grad_() for x in random_inputs()]
    assert torch.autograd.gradcheck(lambda *qkv: kernel(name, *qkv, mask), inputs, fast_mode=True)


def test_a_mask_is_computed_once_for_all_layers():
    inputs = random_inputs()
    mask = mask_of(documents=DOCUMENTS)
    attend(*inputs, mask)
    first = mask.boolean()
    attend(*inputs, mask)
    assert mask.boolean() is first
    assert mask.blocks() is mask.blocks()


def test_layers_use_the_prepared_mask():
    mask = mask_of(documents=DOCUMENTS)
    mask.prepare(dropout=False)
    prepared = mask._additive
    attend(*random_inputs(dtype=torch.float32), mask)
    assert mask._additive is prepared
    full = mask_of(causal=False, window=LENGTH)
    full.prepare(dropout=False)
    assert full._boolean is None


def test_a_window_as_long_as_the_sequence_hides_nothing(kernel):
    inputs = random_inputs()
    assert torch.equal(kernel("sdpa", *inputs, mask_of(window=LENGTH)), kernel("sdpa", *inputs, mask_of()))
    assert not torch.equal(kernel("sdpa", *inputs, mask_of(window=LENGTH - 1)), kernel("sdpa", *inputs, mask_of()))


@pytest.mark.parametrize("name", ["matmul", "sdpa"])
def test_bf16_is_as_exact_as_its_inputs(name, kernel):
    inputs = random_inputs(dtype=torch.bfloat16)
    exact = reference(*(x.double() for x in inputs), expected_mask(True, None, DOCUMENTS))
    output = kernel(name, *inputs, mask_of(documents=DOCUMENTS))
    assert output.dtype == torch.bfloat16
    assert (output.double() - exact).norm() / exact.norm() < 2**-8


def test_attention_dropout_works_at_any_length(kernel):
    q, k, v = random_inputs()
    kept = torch.rand(2, 4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.5
    output = kernel("sdpa", q, k, v, mask_of(documents=DOCUMENTS), dropout=lambda weights: weights * kept)
    scores = torch.einsum("bnth,bnsh->bnts", q, k.repeat_interleave(2, dim=1)) / 4
    weights = scores.masked_fill(~expected_mask(True, None, DOCUMENTS)[:, None], -torch.inf).softmax(-1)
    torch.testing.assert_close(output, (weights * kept) @ v.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("name", ["matmul", "sdpa"])
@pytest.mark.parametrize(("causal", "window", "documents"), MASKS)
def test_attention_compiles_without_graph_breaks(name, causal, window, documents, monkeypatch):
    monkeypatch.setattr(attention, "MATMUL_LIMIT", 0 if name == "sdpa" else 256)
    torch.compiler.reset()

    def layers(q, k, v):
        mask = mask_of(causal=causal, window=window, documents=documents)
        return attend(q, k, v, mask) + attend(q, k, v, mask)

    inputs = random_inputs()
    torch.testing.assert_close(torch.compile(layers, fullgraph=True, backend="aot_eager")(*inputs), layers(*inputs))
