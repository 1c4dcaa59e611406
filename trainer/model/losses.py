"""What is minimised.

Shapes: N tokens (batch and time in one), D model width, V rows of the head's weight that this rank holds, B sequences, C classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from manta.trainer.dataloader.batch import IGNORED

CHUNK = {"cpu": 2**20, "cuda": 2**27}  # logits held at once in fp32: 4 MiB stays in a CPU's cache, 512 MiB keeps a GPU busy
ALIGNED = 8  # classes: 16 bytes of two
LEAST = 256  # tokens a chunk, whatever the vocabulary: below it, reading the weights again costs more than the products


def cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    vocabulary: int,
    bias_V: Tensor | None = None,
    soft_cap: float | None = None,
    smoothing: float = 0.0,
    z_weight: float = 0.0,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the targets under softmax(x weight^T + bias), in nats, summed over those that are not IGNORED.

    -> (objective, z): what is minimised, and the part of it, detached, that is z_weight logsumexp^2 (PaLM, Chowdhery et al. 2022).

    vocabulary: rows of the weight from here on are padding; they take no part and have no gradient.
    soft_cap: logits are bent to soft_cap tanh(logits / soft_cap) before all else (Gemma 2, section 2).
    smoothing: that share of the target's weight goes to all of the vocabulary alike (Szegedy et al. 2015, section 7).
    group: its rank r holds rows [r V, (r + 1) V) of the weight and of the bias, and has the same x and targets as the others
    (Megatron-LM, Shoeybi et al. 2019, section 3). The value is whole on every rank; the gradient of x is this rank's part of a sum.

    The head is part of it, so that logits for all tokens are never held at once: memory is that of a chunk, not O(N V).
    Products are taken in the weight's precision, or in autocast's; the softmax and all sums in fp32 at least.
    """
    rank, ranks = (group.rank(), group.size()) if group is not None else (0, 1)
    rows = len(weight_VD)
    assert 0 < vocabulary <= rows * ranks, (vocabulary, rows, ranks)
    first = rank * rows
    criterion = _Criterion(
        vocabulary=vocabulary,
        soft_cap=soft_cap,
        smoothing=smoothing,
        z_weight=z_weight,
        group=group,
        first=first,
        own=min(max(vocabulary - first, 0), rows),
    )
    return _LinearCrossEntropy.apply(x_ND, weight_VD, bias_V, targets_N, criterion, torch.is_grad_enabled())  # type: ignore[no-any-return]


def classify(logits_BC: Tensor, targets_B: Tensor, weights_B: Tensor) -> Tensor:
    """The weighted sum of each sequence's negative log-likelihood; where a target is IGNORED it is 0."""
    return (F.cross_entropy(logits_BC.to(_wide(logits_BC.dtype)), targets_B, ignore_index=IGNORED, reduction="none") * weights_B).sum()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    if into.dtype == left.dtype:
        into.addmm_(left, right)  # without a tensor of the weight's size between
    else:
        into += left @ right


def _product_dtype(weight: Tensor) -> torch.dtype:
    """The weight's, or autocast's; fp64 is left alone, as autocast does."""
    device = weight.device.type
    cast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else weight.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class _Criterion:
    vocabulary: int
    soft_cap: float | None
    smoothing: float
    z_weight: float
    group: ProcessGroup | None
    first: int  # this rank's logits are those of classes [first, first + own)
    own: int  # 0 where all of its rows are padding

    def __call__(self, logits: Tensor, targets: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
        """Of a chunk: the objective and z. Where it is wanted, the gradient by the logits takes their place."""
        slope = None
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_()
            slope = 1 - logits.square() if wanted else None
            logits.mul_(self.soft_cap)
        counts = targets != IGNORED
        held = self._held(targets, counts)
        column = (targets - self.first).masked_fill_(~held, 0)

        highest = logits.amax(dim=1, keepdim=True) if self.own else logits.new_full(targets.shape, -torch.inf)
        if self.group is not None:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.group)
        logits.sub_(highest)  # what follows is relative to it: the objective does not change, and nothing overflows
        at_target = logits.gather(1, column).masked_fill_(~held, 0) if self.own else torch.zeros_like(highest)
        over_all = logits.sum(dim=1, keepdim=True) if self.smoothing else torch.zeros_like(highest)
        exp_sum = logits.exp_().sum(dim=1, keepdim=True)
        if self.group is not None:
            sums = torch.stack((at_target, over_all, exp_sum))
            dist.all_reduce(sums, group=self.group)
            at_target, over_all, exp_sum = sums.unbind()

        log_sum = exp_sum.log()
        whole = log_sum + highest
        z = (self.z_weight * whole.square()).masked_fill_(~counts, 0).sum()
        on_target, on_each = 1 - self.smoothing, self.smoothing / self.vocabulary
        likelihood = on_target * at_target + on_each * over_all - log_sum
        objective = z - likelihood.masked_fill_(~counts, 0).sum()
        if not wanted:
            return objective, z

        grad = logits.mul_(((1 + 2 * self.z_weight * whole) / exp_sum).masked_fill_(~counts, 0))
        if self.own:
            grad.scatter_add_(1, column, held.to(grad.dtype) * -on_target)
        if self.smoothing:
            grad.sub_(counts.to(grad.dtype) * on_each)
        if slope is not None:
            grad.mul_(slope)
        return objective, z

    def _held(self, targets: Tensor, counts: Tensor) -> Tensor:
        """Whether a target is one of this rank's classes. At the vocabulary's ends no bound is set: a target beyond them raises."""
        held = counts
        if self.first > 0:
            held = held & (targets >= self.first)
        if self.first + self.own < self.vocabulary:
            held = held & (targets < self.first + self.own)
        return held


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of a softmax is at hand when its loss is (p - 1 at the target): it is taken on the way forward, chunk by chunk."""

    @staticmethod
    def forward(  # noqa: PLR0917 - apply() takes no keywords
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, criterion: _Criterion, grad_enabled: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = _product_dtype(weight_VD)
        wide = _wide(dtype)
        of_x, of_weight, of_bias = (grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        grad_x = torch.empty_like(x_ND) if of_x else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if of_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=wide) if of_bias and bias_V is not None else None
        objective, z = (torch.zeros((), dtype=wide, device=x_ND.device) for _ in range(2))
        # On a GPU with a few rows of padding, which the criterion does not see: tensor cores want an even pitch.
        aligned = ALIGNED if x_ND.is_cuda else 1
        held = slice(min(len(weight_VD), -(-criterion.own // aligned) * aligned))
        x, weight = x_ND.to(dtype), weight_VD[held].to(dtype)
        bias = None if bias_V is None else bias_V[held].to(dtype)
        rows = max(LEAST, CHUNK.get(x.device.type, CHUNK["cuda"]) // len(weight_VD))  # the same on all ranks, padding or not
        with torch.autocast(x.device.type, enabled=False):  # it would cast the weight again for each chunk
            for first in range(0, len(x), rows):
                chunk = slice(first, first + rows)
                logits = F.linear(x[chunk], weight, bias).to(wide)
                of_chunk, z_of_chunk = criterion(logits[:, : criterion.own], targets_N[chunk, None], of_x or of_weight or of_bias)
                logits[:, criterion.own :].zero_()
                grad = logits
                objective += of_chunk
                z += z_of_chunk
                if grad_bias is not None:
                    grad_bias[held] += grad.sum(dim=0)
                grad = grad.to(dtype)
                if grad_x is not None:
                    grad_x[chunk] = grad @ weight
                if grad_weight is not None:
                    _add_product(grad_weight[held], grad.T, x[chunk])
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (x_ND, weight_VD, bias_V))
        ctx.mark_non_differentiable(z)
        return objective, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's
        scale = grads[0]  # fp32 without a dimension: it lends a bf16 tensor its value, not its type
        ours = (None if grad is None else (grad * scale).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *ours, None, None, None
