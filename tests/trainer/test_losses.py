"""The fused loss is softmax and likelihood as torch takes them, in value and gradient, however it is cut."""

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
from manta.trainer.model.losses import classify, cross_entropy

TOKENS, WIDTH, ROWS, VOCABULARY = 23, 8, 24, 21  # three rows are padding
OPTIONS = [
    {},
    {"soft_cap": 1.5},
    {"smoothing": 0.1},
    {"z_weight": 0.3},
    {"soft_cap": 1.5, "smoothing": 0.1, "z_weight": 0.3},
]


@pytest.fixture
def chunks_of(monkeypatch):
    def set_to(tokens: int) -> None:
        monkeypatch.setattr(losses, "CHUNK", {"cpu": 1, "cuda": 1})
        monkeypatch.setattr(losses, "LEAST", tokens)

    return set_to


def inputs(dtype=torch.float64, *, rows=ROWS, vocabulary=VOCABULARY, tokens=TOKENS, bias=True):
    """-> the leaves (x, weight and, if asked for, bias) and targets of which a third are ignored."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, WIDTH), (rows, WIDTH), (rows,)]
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[::3] = IGNORED
    return leaves if bias else leaves[:2], targets


def ours(leaves, targets, *, vocabulary=VOCABULARY, **options):
    bias = leaves[2] if len(leaves) == 3 else None
    return cross_entropy(*leaves[:2], targets, vocabulary=vocabulary, bias_V=bias, **options)


def theirs(leaves, targets, *, vocabulary=VOCABULARY, soft_cap=None, smoothing=0.0, z_weight=0.0):
    """The same by torch's own functions, with all logits held at once."""
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
def test_value_and_gradients_are_those_of_torch(options, bias, chunk, chunks_of):
    chunks_of(chunk)
    leaves, targets = inputs(bias=bias)
    got, wanted = (with_gradients(loss, leaves, targets, **options) for loss in (ours, theirs))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert not got[1].requires_grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_those_of_finite_differences(options, bias, chunks_of):
    chunks_of(7)
    leaves, targets = inputs(bias=bias)
    assert torch.autograd.gradcheck(lambda *leaves: ours(leaves, targets, **options)[0], leaves)


def test_a_wrong_gradient_is_told_from_a_right_one():
    leaves, targets = inputs()
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda *leaves: Doubled.apply(ours(leaves, targets)[0]), leaves)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, grad):
        return 2 * grad


def test_a_gradient_of_the_gradient_is_refused():
    leaves, targets = inputs()
    (grad,) = torch.autograd.grad(ours(leaves, targets)[0] ** 2, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lesser_precisions_lose_no_more_than_their_rounding(options, dtype, bound):
    leaves, targets = inputs(dtype)
    got = with_gradients(ours, leaves, targets, **options)
    wanted = with_gradients(theirs, [leaf.double() for leaf in leaves], targets, **options)
    assert got[0].dtype == got[1].dtype == torch.float32
    for mine, exact in zip(got, wanted, strict=True):
        assert (mine - exact).norm() <= bound * exact.norm()
    assert all(grad.dtype == dtype for grad in got[2:])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_under_autocast_products_are_narrow_and_the_rest_is_wide(options):
    leaves, targets = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = ours(leaves, targets, **options), theirs(leaves, targets, **options)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert (got[0] - ours(leaves, targets, **options)[0]).abs() > 1e-4 * got[0]  # the products were narrow indeed
    gradients, others = (torch.autograd.grad(value[0], leaves) for value in (got, wanted))
    for mine, other in zip(gradients, others, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - other).norm() <= 1e-2 * other.norm()


def test_autocast_leaves_fp64_alone():
    leaves, targets = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(leaves, targets)
    assert torch.equal(got[0], ours(leaves, targets)[0])


def test_the_weight_s_gradient_is_summed_in_fp32(chunks_of):
    """In bf16, a sum of many small parts stands still once it is 256 times as large as a part."""
    chunks_of(1)
    x = torch.ones(2000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    objective, _ = cross_entropy(x, weight, torch.zeros(2000, dtype=torch.int64), vocabulary=2)
    objective.backward()
    assert weight.grad.flatten().tolist() == [-1000, 1000]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_what_needs_no_gradient_changes_nothing_for_the_rest(missing):
    leaves, targets = inputs()
    wanted = with_gradients(theirs, leaves, targets)
    leaves[missing].requires_grad_(False)
    objective, _ = ours(leaves, targets)
    (objective * 3).backward()
    assert leaves[missing].grad is None
    for index in {0, 1, 2} - {missing}:
        torch.testing.assert_close(leaves[index].grad, wanted[2 + index])


def test_without_gradients_none_is_taken():
    leaves, targets = inputs()
    with torch.no_grad():
        objective, z = ours(leaves, targets, z_weight=0.1)
    assert not objective.requires_grad
    wanted = ours([leaf.detach() for leaf in leaves], targets, z_weight=0.1)
    torch.testing.assert_close((objective, z), wanted)
    torch.testing.assert_close((objective, z), theirs(leaves, targets, z_weight=0.1), check_device=False)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padding_takes_no_part_whatever_it_holds(options):
    leaves, targets = inputs()
    wanted = with_gradients(ours, leaves, targets, **options)
    with torch.no_grad():
        leaves[1][VOCABULARY:], leaves[2][VOCABULARY:] = torch.inf, torch.nan
    got = with_gradients(ours, leaves, targets, **options)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert not got[3][VOCABULARY:].any()
    assert not got[4][VOCABULARY:].any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tokens", [0, TOKENS])
def test_nothing_to_predict_costs_nothing(options, tokens):
    leaves, targets = inputs(torch.float32, tokens=tokens)
    objective, z, *gradients = with_gradients(ours, leaves, targets.fill_(IGNORED), **options)
    assert objective == z == 0
    assert not any(grad.any() for grad in gradients)  # NaN is not 0 either


def test_large_logits_do_not_overflow():
    leaves, targets = inputs(torch.float32, bias=False)
    leaves = [leaf.detach() * 100 for leaf in leaves]
    got, wanted = (with_gradients(loss, leaves, targets, smoothing=0.1) for loss in (ours, theirs))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("target", [-1, VOCABULARY, ROWS])
def test_a_target_that_is_no_class_is_an_error(target):
    leaves, targets = inputs()
    targets[1] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        ours(leaves, targets)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.bytes = max([self.bytes, *made])
        return result


def test_all_logits_are_never_held_at_once(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", {"cpu": 2**18, "cuda": 2**18})
    tokens = rows = 4096
    leaves, targets = inputs(torch.float32, rows=rows, vocabulary=rows, tokens=tokens)
    seen = {}
    for loss in (ours, theirs):
        with Largest() as largest:
            with_gradients(loss, leaves, targets, vocabulary=rows, smoothing=0.1, z_weight=0.1, soft_cap=9.0)
        seen[loss] = largest.bytes
    assert seen[theirs] >= tokens * rows * 4
    assert seen[ours] == 4 * max(2**18, losses.LEAST * rows)  # a sixteenth


def cut(ranks, options, vocabulary, rows, dtype):
    """On a rank: its part of the weight against the whole of it. Groups of `ranks` ranks beside each other do the same."""
    losses.CHUNK, losses.LEAST = {"cpu": 1, "cuda": 1}, 7
    me, groups = dist.get_rank(), dist.get_world_size() // ranks
    group = [dist.new_group(range(g * ranks, (g + 1) * ranks)) for g in range(groups)][me // ranks]
    leaves, targets = inputs(dtype, rows=rows, vocabulary=vocabulary)
    mine = slice(me % ranks * rows // ranks, (me % ranks + 1) * rows // ranks)
    part = [leaves[0], leaves[1][mine], leaves[2][mine]]
    objective, z, of_x, *others = with_gradients(ours, part, targets, vocabulary=vocabulary, group=group, **options)
    partial = of_x.clone()
    dist.all_reduce(of_x, group=group)
    whole = with_gradients(ours, leaves, targets, vocabulary=vocabulary, **options)
    wanted = *whole[:3], *(grad[mine] for grad in whole[3:])
    bound = 1e-6 if dtype == torch.float32 else 1e-14
    for got, of_whole in zip((objective, z, of_x, *others), wanted, strict=True):
        assert (got - of_whole).norm() <= bound * of_whole.norm()
    return torch.equal(partial, of_x), float(objective)


@pytest.mark.parametrize(
    ("world", "ranks", "vocabulary", "rows"),
    [
        (2, 2, VOCABULARY, ROWS),
        (4, 4, VOCABULARY, ROWS),
        (4, 4, 10, ROWS),  # the third rank's last rows are padding, and all of the fourth's
        (4, 2, 12, ROWS),  # two groups; all of the second ranks' rows are padding
    ],
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_vocabulary_cut_over_ranks_gives_what_the_whole_gives(options, world, ranks, vocabulary, rows):
    told = spmd(cut_in_both_precisions, world, ranks, options, vocabulary, rows)
    assert len({value for answers in told for _, value in answers}) == 2  # one a precision: all ranks have the same, to the bit
    has_classes = [rank % ranks * (rows // ranks) < vocabulary for rank in range(world)]
    if sum(has_classes[:ranks]) > 1:  # a part is not the whole
        assert not any(same for answers in told for same, _ in answers)


def cut_in_both_precisions(*arguments):
    told = [cut(*arguments, dtype) for dtype in (torch.float32, torch.float64)]
    dist.barrier()  # the first rank keeps the store by which the other groups still meet
    return told


def test_without_a_gradient_the_ranks_agree_too():
    told = spmd(evaluated, 2)
    leaves, targets = inputs()
    assert told == pytest.approx([float(ours(leaves, targets)[0].detach())] * 2, rel=1e-12)


def evaluated():
    leaves, targets = inputs()
    mine = slice(dist.get_rank() * ROWS // 2, (dist.get_rank() + 1) * ROWS // 2)
    with torch.no_grad():
        return float(ours([leaves[0], leaves[1][mine], leaves[2][mine]], targets, group=dist.group.WORLD)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sequences_are_classified_by_weight(dtype):
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 5.0]], dtype=dtype)
    got = classify(logits, torch.tensor([0, IGNORED, 1]), torch.tensor([1.0, 1.0, 3.0]))
    assert float(got) == pytest.approx(0.126928 + 3 * 0.018150, rel=1e-4)
