"""The fused loss equals torch's cross-entropy in value and gradient, for any chunk size and vocabulary shard."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from spmd import spmd
from torch.autograd.gradcheck import GradcheckError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manta.trainer.dataloader.batch import IGNORED
from manta.trainer.model import losses
from manta.trainer.model.losses import Criterion, classification_loss, cross_entropy
from manta.trainer.parallel.tensor import vocabulary_shard

TOKENS, WIDTH, ROWS, VOCABULARY = 23, 8, 24, 21  # three rows are padding
OPTIONS = [
    {},
    {"soft_cap": 1.5},
    {"smoothing": 0.1},
    {"z_weight": 0.3},
    {"soft_cap": 1.5, "smoothing": 0.1, "z_weight": 0.3},
]


@pytest.fixture
def set_chunk_size(monkeypatch):
    def set_to(tokens: int) -> None:
        monkeypatch.setattr(losses, "CHUNK", {"cpu": 1, "cuda": 1})
        monkeypatch.setattr(losses, "MIN_TOKENS", tokens)

    return set_to


def inputs(dtype=torch.float64, *, rows=ROWS, vocabulary=VOCABULARY, tokens=TOKENS, bias=True):
    """Return the leaves (x, weight, and bias if requested) and targets, a third of which are ignored."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, WIDTH), (rows, WIDTH), (rows,)]
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[::3] = IGNORED
    return leaves if bias else leaves[:2], targets


def fused_loss(leaves, targets, *, vocabulary=VOCABULARY, **options):
    bias = leaves[2] if len(leaves) == 3 else None
    return cross_entropy(*leaves[:2], targets, Criterion(vocabulary=vocabulary, **options), bias_V=bias)


def torch_loss(leaves, targets, *, vocabulary=VOCABULARY, soft_cap=None, smoothing=0.0, z_weight=0.0):
    """The same by torch's functions, with all logits in memory."""
    logits = F.linear(*leaves)[:, :vocabulary]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    likelihood = F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum")
    z = z_weight * logits.logsumexp(dim=1)[targets != IGNORED].square().sum()
    return likelihood + z, z.detach()


def with_gradients(loss, leaves, *arguments, **options):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    objective, z = loss(leaves, *arguments, **options)
    (objective * 3).backward()
    return objective.detach(), z, *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 256])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_and_gradients_equal_torchs(options, bias, chunk, set_chunk_size):
    set_chunk_size(chunk)
    leaves, targets = inputs(bias=bias)
    result, expected = (with_gradients(loss, leaves, targets, **options) for loss in (fused_loss, torch_loss))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert not result[1].requires_grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_match_finite_differences(options, bias, set_chunk_size):
    set_chunk_size(7)
    leaves, targets = inputs(bias=bias)
    assert torch.autograd.gradcheck(lambda *leaves: fused_loss(leaves, targets, **options)[0], leaves)


def test_gradcheck_detects_a_wrong_gradient():
    leaves, targets = inputs()
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda *leaves: Doubled.apply(fused_loss(leaves, targets)[0]), leaves)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, grad):
        return 2 * grad


def test_double_backward_is_refused():
    leaves, targets = inputs()
    (grad,) = torch.autograd.grad(fused_loss(leaves, targets)[0] ** 2, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_low_precision_error_is_bounded_by_rounding(options, dtype, bound):
    leaves, targets = inputs(dtype)
    result = with_gradients(fused_loss, leaves, targets, **options)
    expected = with_gradients(torch_loss, [leaf.double() for leaf in leaves], targets, **options)
    assert result[0].dtype == result[1].dtype == torch.float32
    for value, exact in zip(result, expected, strict=True):
        assert (value - exact).norm() <= bound * exact.norm()
    assert all(grad.dtype == dtype for grad in result[2:])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_autocast_applies_to_products_only(options):
    leaves, targets = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, expected = fused_loss(leaves, targets, **options), torch_loss(leaves, targets, **options)
    assert result[0].dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert (result[0] - fused_loss(leaves, targets, **options)[0]).abs() > 1e-4 * result[0]  # the products were in bf16 indeed
    gradients, expected_gradients = (torch.autograd.grad(value[0], leaves) for value in (result, expected))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - expected_gradient).norm() <= 1e-2 * expected_gradient.norm()


def test_autocast_does_not_change_fp64():
    leaves, targets = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = fused_loss(leaves, targets)
    assert torch.equal(result[0], fused_loss(leaves, targets)[0])


def test_the_weights_gradient_is_accumulated_in_fp32(set_chunk_size):
    """In bf16, a sum of many equal terms stops growing at 256 times a term."""
    set_chunk_size(1)
    x = torch.ones(2000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    objective, _ = cross_entropy(x, weight, torch.zeros(2000, dtype=torch.int64), Criterion(vocabulary=2))
    objective.backward()
    assert weight.grad.flatten().tolist() == [-1000, 1000]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_inputs_without_gradient_do_not_affect_other_gradients(missing):
    leaves, targets = inputs()
    expected = with_gradients(torch_loss, leaves, targets)
    leaves[missing].requires_grad_(False)
    objective, _ = fused_loss(leaves, targets)
    (objective * 3).backward()
    assert leaves[missing].grad is None
    for index in {0, 1, 2} - {missing}:
        torch.testing.assert_close(leaves[index].grad, expected[2 + index])


def test_no_gradient_is_computed_under_no_grad():
    leaves, targets = inputs()
    with torch.no_grad():
        objective, z = fused_loss(leaves, targets, z_weight=0.1)
    assert not objective.requires_grad
    expected = fused_loss([leaf.detach() for leaf in leaves], targets, z_weight=0.1)
    torch.testing.assert_close((objective, z), expected)
    torch.testing.assert_close((objective, z), torch_loss(leaves, targets, z_weight=0.1), check_device=False)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padding_rows_do_not_affect_the_loss(options):
    leaves, targets = inputs()
    expected = with_gradients(fused_loss, leaves, targets, **options)
    with torch.no_grad():
        leaves[1][VOCABULARY:], leaves[2][VOCABULARY:] = torch.inf, torch.nan
    result = with_gradients(fused_loss, leaves, targets, **options)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert not result[3][VOCABULARY:].any()
    assert not result[4][VOCABULARY:].any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tokens", [0, TOKENS])
def test_ignored_targets_give_zero_loss_and_gradients(options, tokens):
    leaves, targets = inputs(torch.float32, tokens=tokens)
    objective, z, *gradients = with_gradients(fused_loss, leaves, targets.fill_(IGNORED), **options)
    assert objective == z == 0
    assert not any(grad.any() for grad in gradients)  # also not NaN


def test_large_logits_do_not_overflow():
    leaves, targets = inputs(torch.float32, bias=False)
    leaves = [leaf.detach() * 100 for leaf in leaves]
    result, expected = (with_gradients(loss, leaves, targets, smoothing=0.1) for loss in (fused_loss, torch_loss))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("target", [-1, VOCABULARY, ROWS])
def test_a_target_out_of_range_is_an_error(target):
    leaves, targets = inputs()
    targets[1] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        fused_loss(leaves, targets)


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return result


def test_logits_of_all_tokens_are_never_in_memory_at_once(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", {"cpu": 2**18, "cuda": 2**18})
    tokens = rows = 4096
    leaves, targets = inputs(torch.float32, rows=rows, vocabulary=rows, tokens=tokens)
    largest_bytes = {}
    for loss in (fused_loss, torch_loss):
        with Largest() as largest:
            with_gradients(loss, leaves, targets, vocabulary=rows, smoothing=0.1, z_weight=0.1, soft_cap=9.0)
        largest_bytes[loss] = largest.bytes
    assert largest_bytes[torch_loss] >= tokens * rows * 4
    assert largest_bytes[fused_loss] == 4 * max(2**18, losses.MIN_TOKENS * rows)  # a sixteenth


def sharded(ranks, options, vocabulary, rows, dtype):
    """Compare this rank's shard of the weight with the whole weight. Several groups of `ranks` ranks do the same."""
    losses.CHUNK, losses.MIN_TOKENS = {"cpu": 1, "cuda": 1}, 7
    rank, groups = dist.get_rank(), dist.get_world_size() // ranks
    group = [dist.new_group(range(g * ranks, (g + 1) * ranks)) for g in range(groups)][rank // ranks]
    leaves, targets = inputs(dtype, rows=rows, vocabulary=vocabulary)
    local = slice(rank % ranks * rows // ranks, (rank % ranks + 1) * rows // ranks)
    local_leaves = [leaves[0], leaves[1][local], leaves[2][local]]
    shard = vocabulary_shard(group)
    objective, z, grad_x, *others = with_gradients(fused_loss, local_leaves, targets, vocabulary=vocabulary, shard=shard, **options)
    partial = grad_x.clone()
    dist.all_reduce(grad_x, group=group)
    whole = with_gradients(fused_loss, leaves, targets, vocabulary=vocabulary, **options)
    expected = *whole[:3], *(grad[local] for grad in whole[3:])
    bound = 1e-6 if dtype == torch.float32 else 1e-14
    for value, expected_value in zip((objective, z, grad_x, *others), expected, strict=True):
        assert (value - expected_value).norm() <= bound * expected_value.norm()
    return torch.equal(partial, grad_x), float(objective)


@pytest.mark.parametrize(
    ("world", "ranks", "vocabulary", "rows"),
    [
        (2, 2, VOCABULARY, ROWS),
        (4, 4, VOCABULARY, ROWS),
        (4, 4, 10, ROWS),  # padding: the last rows of the third rank, and all of the fourth's
        (4, 2, 12, ROWS),  # two groups; all rows of the second ranks are padding
    ],
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_sharded_vocabulary_gives_the_loss_of_the_whole(options, world, ranks, vocabulary, rows):
    results = spmd(sharded_in_both_precisions, world, ranks, options, vocabulary, rows)
    assert len({value for result in results for _, value in result}) == 2  # one per precision: all ranks have bitwise the same
    has_classes = [rank % ranks * (rows // ranks) < vocabulary for rank in range(world)]
    if sum(has_classes[:ranks]) > 1:  # a partial gradient differs from the sum
        assert not any(same for result in results for same, _ in result)


def sharded_in_both_precisions(*arguments):
    results = [sharded(*arguments, dtype) for dtype in (torch.float32, torch.float64)]
    dist.barrier()  # the first rank's store must outlive the rendezvous of the other groups
    return results


def test_shards_agree_without_gradients():
    results = spmd(evaluated, 2)
    leaves, targets = inputs()
    assert results == pytest.approx([float(fused_loss(leaves, targets)[0].detach())] * 2, rel=1e-12)


def evaluated():
    leaves, targets = inputs()
    local = slice(dist.get_rank() * ROWS // 2, (dist.get_rank() + 1) * ROWS // 2)
    with torch.no_grad():
        return float(fused_loss([leaves[0], leaves[1][local], leaves[2][local]], targets, shard=vocabulary_shard(dist.group.WORLD))[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_classification_loss_weights_sequences(dtype):
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 5.0]], dtype=dtype)
    result = classification_loss(logits, torch.tensor([0, IGNORED, 1]), torch.tensor([1.0, 1.0, 3.0]))
    assert float(result) == pytest.approx(0.126928 + 3 * 0.018150, rel=1e-4)
