"""Cross-entropy fused with the output head, and classification of sequences.

Shapes: N tokens (batch and time flattened), D model width, V rows of the head's weight in this shard, B sequences, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from manta.trainer.dataloader.batch import IGNORED

CHUNK = {"cpu": 2**20, "cuda": 2**27}  # fp32 logits in memory at once: 4 MiB stays in a CPU's cache, 512 MiB keeps a GPU busy
ALIGNMENT = 8  # classes: 16 bytes in a 16-bit type
MIN_TOKENS = 256  # per chunk, for any vocabulary: below it, reading the weights again costs more than the products


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyShard:
    """Shard `index` of `count` equal shards of the vocabulary's rows, and reductions over all shards. Both work in place.

    Shard r holds rows [r V, (r + 1) V) of the weight and of the bias (Megatron-LM, Shoeybi et al. 2019, section 3). All shards see the same
    x and targets.
    """

    index: int
    count: int
    reduce_max: Callable[[Tensor], object]
    reduce_sum: Callable[[Tensor], object]


class TokenLosses(NamedTuple):
    """What is measured of each of N targets; 0 for those that are IGNORED."""

    losses: Tensor  # [N], fp32 or wider: its part of the loss, in nats
    correct: Tensor  # [N], bool: whether no token has a larger logit


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """The options of a cross-entropy over the vocabulary."""

    vocabulary: int  # rows of the weight from here on are padding: they take no part and have no gradient
    soft_cap: float | None = None  # logits are first mapped to soft_cap tanh(logits / soft_cap) (Gemma 2, section 2)
    smoothing: float = 0.0  # share of the target's weight that is spread over the vocabulary (Szegedy et al. 2015, section 7)
    z_weight: float = 0.0  # of logsumexp^2 (PaLM, Chowdhery et al. 2022)
    shard: VocabularyShard | None = None  # the rows that the weight holds; None: all of them

    def classes(self, rows: int) -> range:
        """Return the classes of a weight with this number of rows; none if all rows of a shard are padding."""
        index, count = (self.shard.index, self.shard.count) if self.shard else (0, 1)
        assert 0 < self.vocabulary <= rows * count, (self.vocabulary, rows, count)
        return range(index * rows, max(index * rows, min((index + 1) * rows, self.vocabulary)))

    def apply(self, logits: Tensor, targets: Tensor, classes: range, *, needs_grad: bool) -> tuple[TokenLosses, Tensor]:
        """Return what is measured of each target of a chunk [N, 1], and its z-loss. If needed, overwrite the logits by their gradient."""
        slope = None
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_()
            slope = 1 - logits.square() if needs_grad else None
            logits.mul_(self.soft_cap)
        counts = targets != IGNORED
        local = self._is_local(targets, counts, classes)
        column = (targets - classes.start).masked_fill_(~local, 0)

        highest = logits.amax(dim=1, keepdim=True) if classes else logits.new_full(targets.shape, -torch.inf)
        if self.shard:
            self.shard.reduce_max(highest)
        logits.sub_(highest)  # the objective does not change, and nothing overflows
        at_target = logits.gather(1, column).masked_fill_(~local, 0) if classes else torch.zeros_like(highest)
        over_all = logits.sum(dim=1, keepdim=True) if self.smoothing else torch.zeros_like(highest)
        exp_sum = logits.exp_().sum(dim=1, keepdim=True)
        if self.shard:
            sums = torch.stack((at_target, over_all, exp_sum))
            self.shard.reduce_sum(sums)
            at_target, over_all, exp_sum = sums.unbind()

        log_sum = exp_sum.log()
        log_partition = log_sum + highest
        z = (self.z_weight * log_partition.square()).masked_fill_(~counts, 0)
        on_target, on_each = 1 - self.smoothing, self.smoothing / self.vocabulary
        likelihood = on_target * at_target + on_each * over_all - log_sum
        measured = TokenLosses(losses=(-likelihood).masked_fill_(~counts, 0), correct=(at_target == 0) & counts)
        if not needs_grad:
            return measured, z

        grad = logits.mul_(((1 + 2 * self.z_weight * log_partition) / exp_sum).masked_fill_(~counts, 0))
        if classes:
            grad.scatter_add_(1, column, local.to(grad.dtype) * -on_target)
        if self.smoothing:
            grad.sub_(counts.to(grad.dtype) * on_each)
        if slope is not None:
            grad.mul_(slope)
        return measured, z

    def _is_local(self, targets: Tensor, counts: Tensor, classes: range) -> Tensor:
        """Whether a target is one of the shard's classes. There is no bound at the vocabulary's ends: a target beyond them raises."""
        if classes.start > 0:
            counts = counts & (targets >= classes.start)
        if classes.stop < self.vocabulary:
            counts = counts & (targets < classes.stop)
        return counts


def cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    criterion: Criterion,
    *,
    bias_V: Tensor | None = None,
    measured: list[TokenLosses] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood of the targets under softmax(x weight^T + bias), in nats, summed over targets not IGNORED.

    -> (objective, z): the quantity to minimize, and its part z_weight logsumexp^2, detached. With a shard, both are those of the whole
    vocabulary, and the gradient of x is this shard's term of a sum. measured: what is measured of each target is appended to it, in parts.

    It includes the head, so that logits of all tokens are never in memory at once: memory is that of a chunk, not O(N V).
    Products use the weight's precision, or autocast's; the softmax and all sums at least fp32; without a gradient, sums are fp64.
    """
    return _LinearCrossEntropy.apply(x_ND, weight_VD, bias_V, targets_N, criterion, torch.is_grad_enabled(), measured)  # type: ignore[no-any-return]


def classification_loss(logits_BC: Tensor, targets_B: Tensor, weights_B: Tensor) -> Tensor:
    """Return the weighted sum of the sequences' negative log-likelihoods; an IGNORED target contributes 0."""
    wide_BC = logits_BC.to(_at_least_fp32(logits_BC.dtype))
    return (F.cross_entropy(wide_BC, targets_B, ignore_index=IGNORED, reduction="none") * weights_B).sum()


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    if into.dtype == left.dtype:
        into.addmm_(left, right)  # needs no temporary of the weight's size
    else:
        into += left @ right


def _product_dtype(weight: Tensor) -> torch.dtype:
    """Return the weight's dtype, or autocast's; like autocast, keep fp64."""
    device = weight.device.type
    cast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else weight.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """A softmax's gradient (p - 1 at the target) is a by-product of its loss: the forward pass computes both, chunk by chunk."""

    @staticmethod
    def forward(  # noqa: PLR0917 - apply() takes no keywords
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        criterion: Criterion,
        grad_enabled: bool,
        measured: list[TokenLosses] | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = _product_dtype(weight_VD)
        wide = _at_least_fp32(dtype)
        of_x, of_weight, of_bias = (grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        grad_x = torch.empty_like(x_ND) if of_x else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if of_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=wide) if of_bias and bias_V is not None else None
        total = wide if grad_enabled else torch.float64
        loss, z = (torch.zeros((), dtype=total, device=x_ND.device) for _ in range(2))
        classes = criterion.classes(len(weight_VD))
        # On a GPU, include a few rows of padding, which the criterion does not see: tensor cores need an aligned pitch.
        alignment = ALIGNMENT if x_ND.is_cuda else 1
        used = slice(min(len(weight_VD), -(-len(classes) // alignment) * alignment))
        x, weight = x_ND.to(dtype), weight_VD[used].to(dtype)
        bias = None if bias_V is None else bias_V[used].to(dtype)
        rows = max(MIN_TOKENS, CHUNK.get(x.device.type, CHUNK["cuda"]) // len(weight_VD))  # the same for all shards, padding or not
        with torch.autocast(x.device.type, enabled=False):  # it would cast the weight again for each chunk
            for first in range(0, len(x), rows):
                chunk = slice(first, first + rows)
                logits = F.linear(x[chunk], weight, bias).to(wide)
                local = logits[:, : len(classes)]
                tokens, z_N = criterion.apply(local, targets_N[chunk, None], classes, needs_grad=of_x or of_weight or of_bias)
                logits[:, len(classes) :].zero_()
                grad = logits
                loss += tokens.losses.sum(dtype=total)
                z += z_N.sum(dtype=total)
                if measured is not None:
                    measured.append(TokenLosses(*(values[:, 0] for values in tokens)))
                if grad_bias is not None:
                    grad_bias[used] += grad.sum(dim=0)
                grad = grad.to(dtype)
                if grad_x is not None:
                    grad_x[chunk] = grad @ weight
                if grad_weight is not None:
                    _add_product(grad_weight[used], grad.T, x[chunk])
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (x_ND, weight_VD, bias_V))
        ctx.mark_non_differentiable(z)
        return loss + z, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's
        scale = grads[0]  # a 0-dim fp32 tensor: it does not change a bf16 tensor's type
        scaled = (None if grad is None else (grad * scale).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *scaled, None, None, None, None
