"""A mixture of experts follows its papers and drops no token."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from manta.trainer.config.model import ExpertsConfig
from manta.trainer.model import moe
from manta.trainer.model.moe import Experts, MixtureOfExperts, Router

WIDTH = 8
CONFIG = ExpertsConfig(experts=4, top_k=2, width=12)
OPTIONS = [
    {"score": score, "normalize": normalize, "balance": balance, "top_k": top_k, "scale": scale, "shared": shared}
    for score, normalize, balance, (top_k, scale, shared) in itertools.product(
        ("softmax", "sigmoid"), (True, False), ("loss", "bias", "none"), ((1, 1.0, 0), (2, 2.5, 0), (3, 1.0, 2))
    )
]


def build(seed=0, dtype=torch.float64, **changes) -> MixtureOfExperts:
    torch.manual_seed(seed)
    block = MixtureOfExperts(WIDTH, CONFIG.model_copy(update=changes))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if block.router.bias is not None:
        block.router.bias.copy_(torch.randn(block.router.experts) * 0.3)
    return block.to(dtype)


def naive(block, x_BTD, mask_BT):
    """The papers' formulas, for one token and one expert at a time."""
    config, router, experts = block.router.config, block.router, block.experts
    y_BTD, balance, z, load = torch.zeros_like(x_BTD), 0.0, 0.0, [0] * config.experts
    for b, x_TD in enumerate(x_BTD):
        f, P, tokens = [0.0] * config.experts, [0.0] * config.experts, max(int(mask_BT[b].sum()), 1)
        for t, x in enumerate(x_TD):
            logits = router.weight @ x
            scores = logits.softmax(0) if config.score == "softmax" else 1 / (1 + torch.exp(-logits))
            ranking = (scores if router.bias is None else scores + router.bias).tolist()
            chosen = sorted(range(config.experts), key=lambda e, ranking=ranking: -ranking[e])[: config.top_k]
            total = sum(scores[e] for e in chosen) if config.normalize else 1.0
            for e in chosen:
                hidden = F.silu(experts.gate_proj[e] @ x) * (experts.up_proj[e] @ x)
                y_BTD[b, t] += config.scale * scores[e] / total * (experts.down_proj[e] @ hidden)
            if block.shared is not None:
                y_BTD[b, t] += block.shared(x)
            if mask_BT[b, t]:
                z += torch.logsumexp(logits, 0) ** 2
                for e in range(config.experts):
                    f[e] += (e in chosen) / (config.top_k * tokens)
                    P[e] += scores[e] / scores.sum() / tokens
                    load[e] += e in chosen
        balance += config.experts * sum(f[e] * P[e] for e in range(config.experts))
    zero = torch.zeros((), dtype=x_BTD.dtype)
    return y_BTD, torch.stack((balance + zero if config.balance == "loss" else zero, z + zero)), load


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_output_and_gradients_equal_those_of_one_token_at_a_time(options):
    block = build(**options)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    leaves = [x, *block.parameters()]
    y, sums = block(x, mask)
    wanted_y, wanted_sums, load = naive(block, x, mask)
    torch.testing.assert_close(y, wanted_y)
    torch.testing.assert_close(sums, wanted_sums)
    assert block.router.load.tolist() == load
    outward, parts = torch.randn_like(y), torch.tensor([0.7, 0.3], dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((a * outward).sum() + (b * parts).sum(), leaves, materialize_grads=True)
        for a, b in ((y, sums), (wanted_y, wanted_sums))
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("score", "normalize"), [*itertools.product(("softmax", "sigmoid"), (True, False))])
def test_the_routers_gradients_match_finite_differences(score, normalize):
    router, x = wide_gaps(build(score=score, normalize=normalize))
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 2] = False

    def weights_and_sums(x_BTD, weight):
        weights, _, sums = torch.func.functional_call(router, {"weight": weight}, (x_BTD, mask))
        return weights, sums

    assert torch.autograd.gradcheck(weights_and_sums, (x, router.weight))


@pytest.mark.parametrize("shared", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_blocks_gradients_match_finite_differences(shared):
    block = build(shared=shared)
    _, x = wide_gaps(block)
    names = [name for name, _ in block.named_parameters()]

    def outputs(x_BTD, *values):
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x_BTD,))

    assert torch.autograd.gradcheck(outputs, (x, *block.parameters()), atol=1e-6)


def wide_gaps(block) -> tuple[Router, torch.Tensor]:
    """Return the router and tokens far from a change of experts, which a finite difference must not cause."""
    tokens = torch.randn(400, WIDTH, dtype=torch.float64)
    logits = (tokens @ block.router.weight.T).sort(dim=-1, descending=True).values
    clear = tokens[(logits[:, 1] - logits[:, 2] > 0.2) & (logits.abs().amax(dim=-1) < 3)][:6]
    assert len(clear) == 6
    return block.router, clear.view(2, 3, WIDTH).requires_grad_()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 30), min_size=4, max_size=4), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_every_row_gets_its_experts_output_at_any_imbalance(counts, dtype):
    torch.manual_seed(1)
    experts = Experts(4, WIDTH, 16).to(dtype)
    x = torch.randn(sum(counts), WIDTH, dtype=dtype, requires_grad=True)
    y = experts(x, torch.tensor(counts))
    owner = torch.repeat_interleave(torch.tensor(counts))
    for row, e in enumerate(owner.tolist()):
        hidden = F.silu(experts.gate_proj[e] @ x[row]) * (experts.up_proj[e] @ x[row])
        torch.testing.assert_close(y[row], experts.down_proj[e] @ hidden, rtol=2e-2, atol=2e-4)
    y.sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        for e, count in enumerate(counts):
            assert bool(parameter.grad[e].any()) == (count > 0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0, 50), st.integers(1, 4))
def test_no_token_is_dropped_at_any_imbalance(seed, lean, top_k):
    block = build(seed, balance="bias", top_k=top_k, normalize=True)
    block.router.bias = lean * torch.arange(4.0)  # at the extreme all tokens choose the same experts
    block.experts.forward = lambda x_MD, _counts: x_MD  # identity experts: their weighted mean is the token
    x = torch.randn(3, 7, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(block(x)[0], x)
    assert int(block.router.load.sum()) == 21 * top_k


def test_experts_of_unaligned_sizes_are_computed_correctly():
    experts = Experts(3, 5, 7)
    counts = torch.tensor([2, 0, 3])
    x = torch.randn(5, 5)
    double = Experts(3, 5, 7).double()
    double.load_state_dict(experts.state_dict())
    torch.testing.assert_close(experts(x, counts).double(), double(x.double(), counts), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("balance", ["loss", "bias"])
@pytest.mark.parametrize("parts", [(6,), (3, 3), (1, 5), (1, 1, 1, 1, 1, 1)])
def test_loss_sums_do_not_depend_on_the_split_into_batches(parts, balance):
    block = build(balance=balance)
    x, mask = torch.randn(6, 9, WIDTH, dtype=torch.float64), torch.rand(6, 9) > 0.3
    mask[4] = False  # only padding
    whole = block(x, mask)[1]
    load = block.router.load.clone()
    block.router.load.zero_()
    dealt = sum(block(some, real)[1] for some, real in zip(x.split(parts), mask.split(parts), strict=True))
    torch.testing.assert_close(dealt, whole)
    assert torch.equal(block.router.load, load)


def test_padding_affects_only_its_own_output():
    block = build()
    x = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    y, sums = block(x)
    load = block.router.load.clone()
    block.router.load.zero_()
    mask = (torch.arange(9) < 6).expand(2, -1)
    padded_y, padded_sums = block(torch.cat((x, torch.randn(2, 3, WIDTH, dtype=torch.float64)), dim=1), mask)
    torch.testing.assert_close(padded_y[:, :6], y)
    torch.testing.assert_close(padded_sums, sums)
    assert torch.equal(block.router.load, load)


def test_a_split_sequence_has_the_loss_of_the_whole():
    block = build()
    x = torch.randn(3, 8, WIDTH, dtype=torch.float64)
    whole = block(x)[1]
    seen = []
    block.router.sum_over_sequence = lambda sums: seen.append(sums) or sums
    for half in x.chunk(2, dim=1):
        block(half)
    block.router.sum_over_sequence = lambda _sums: sum(seen[:2])  # as after an all-reduce over two ranks
    block.router.sequence_share = 0.5
    halves = [block(half)[1] for half in x.chunk(2, dim=1)]
    torch.testing.assert_close(sum(halves), whole)


def test_balance_loss_is_one_if_even_and_largest_for_one_expert():
    router = Router(4, ExpertsConfig(experts=4, top_k=1, width=4, normalize=False))
    with torch.no_grad():
        router.weight.copy_(torch.eye(4) * 100)
    _, _, (even, _) = router(torch.eye(4).repeat(3, 2, 1))
    _, _, (single, _) = router(torch.eye(4)[:1].expand(3, 8, 4))
    torch.testing.assert_close(even, torch.tensor(3.0))
    torch.testing.assert_close(single, torch.tensor(12.0))


def test_the_bias_balances_the_load():
    torch.manual_seed(0)
    config = ExpertsConfig(experts=4, top_k=1, width=4, score="sigmoid", normalize=False, balance="bias", bias_update_speed=0.01)
    router = Router(WIDTH, config)
    with torch.no_grad():
        router.weight.copy_(torch.randn(4, WIDTH) * 0.3)
    x = torch.randn(16, 64, WIDTH) + 1.0  # some experts are liked by nearly all
    worst = []
    for _ in range(200):
        router(x)
        worst.append(float(router.load.max()) / float(router.load.float().mean()))
        router.end_step(router.load)
    assert worst[0] > 1.8
    assert max(worst[-20:]) < 1.15


def test_the_bias_update_uses_only_the_sign_and_resets_the_load():
    router = Router(WIDTH, CONFIG.model_copy(update={"balance": "bias", "bias_update_speed": 0.25}))
    router.load += 7
    router.end_step(torch.tensor([10.0, 2.0, 6.0, 6.0]))
    assert router.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    assert router.load.tolist() == [0, 0, 0, 0]
    router.load += 7
    router.end_step(torch.tensor([10.0, 2.0, 6.0, 6.0]), skipped=True)  # as after an overflow in fp16
    assert router.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    assert router.load.tolist() == [0, 0, 0, 0]


def test_the_bias_affects_the_choice_but_not_the_weights():
    block = build(balance="bias", normalize=False, top_k=1)
    block.router.bias = torch.tensor([0.0, 0.0, 9.0, 0.0])
    x = torch.randn(1, 5, WIDTH, dtype=torch.float64)
    weights, chosen, _ = block.router(x)
    assert set(chosen.flatten().tolist()) == {2}
    torch.testing.assert_close(weights[:, 0], (x[0] @ block.router.weight.T).softmax(dim=-1)[:, 2])


def test_only_bias_balancing_has_a_bias():
    assert build(balance="loss").router.bias is None
    half = build(balance="bias").to(torch.bfloat16)
    assert half.router.bias.dtype == torch.float32
    assert half.router.load.dtype == torch.int64


def test_evaluation_does_not_count_load():
    block = build().eval()
    block(torch.randn(2, 5, WIDTH, dtype=torch.float64))
    assert block.router.load.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_routes_alike_and_counts_once(reentrant):
    x = torch.randn(2, 16, WIDTH, requires_grad=True)
    traces = []
    for recomputed in (False, True):
        block = build(dtype=torch.float32)
        chosen = []
        block.router.register_forward_hook(lambda _module, _x, out, chosen=chosen: chosen.append(out[1]))
        y, sums = checkpoint(block, x, use_reentrant=reentrant) if recomputed else block(x)
        gradients = torch.autograd.grad(y.square().sum() + sums.sum(), x) if not reentrant else backward(y, sums, x)
        assert len(chosen) == 1 + recomputed
        traces.append((*chosen[:1], y, *gradients, block.router.load))
        assert torch.equal(chosen[0], chosen[-1])
    for plain, again in zip(*traces, strict=True):
        assert torch.equal(plain, again)


def backward(y, sums, x) -> tuple[torch.Tensor]:
    """Reentrant checkpoints do not support torch.autograd.grad."""
    x.grad = None
    (y.square().sum() + sums.sum()).backward()
    return (x.grad,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routing_is_in_fp32_in_low_precision(dtype):
    block, double = build(dtype=dtype), build()
    double.load_state_dict(block.state_dict())
    x = torch.randn(2, 64, WIDTH).to(dtype)
    y, sums = block(x)
    wanted, wanted_sums = double(x.double())
    assert (y.dtype, sums.dtype) == (dtype, torch.float32)
    assert torch.equal(block.router(x)[1], double.router(x.double())[1])
    torch.testing.assert_close(y.double(), wanted, rtol=0.05, atol=0.3)
    torch.testing.assert_close(sums.double(), wanted_sums, rtol=1e-4, atol=1e-4)


def test_autocast_does_not_affect_the_router():
    block = build(dtype=torch.float32, shared=1)
    x = torch.randn(2, 64, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, sums = block(x)
        again = block.router(x)
    plain = block.router(x)
    assert y.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    (y.sum() + sums.sum()).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in block.parameters())
    torch.testing.assert_close(y.float(), block(x)[0], rtol=0.05, atol=0.3)


def test_the_private_part_of_torch_detects_a_backward_pass():
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _grad: seen.append(moe._recomputing()))
    assert not moe._recomputing()
    (x * 2).backward()
    assert seen == [True]


def test_the_grouped_product_is_used_if_supported(monkeypatch):
    called = []
    real = F.grouped_mm
    monkeypatch.setattr(moe, "F", SimpleNamespace(silu=F.silu, grouped_mm=lambda *a, **k: called.append(1) or real(*a, **k)))
    experts, counts = Experts(4, 8, 16), torch.tensor([3, 0, 2, 1])
    experts(torch.randn(6, 8, requires_grad=True), counts).sum().backward()
    assert len(called) == 9  # three forward, three for each of the two gradients
