"""Dropless mixture of experts (Shazeer et al. 2017): rows are sorted by expert, and each expert multiplies its contiguous rows, as in
MegaBlocks (Gale et al. 2022). No token is dropped, however uneven the choice.

Shapes: B batch, T time, D model width, E experts, F inner width of an expert, K experts per token, N tokens (batch and time flattened),
M = N K rows, one for each pair of a token and one of its experts.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manta.trainer.config.model import ExpertsConfig
from manta.trainer.model.layers import SwiGLU

BLACKWELL = 10  # its grouped product does not write the output of an expert without tokens (pytorch issue 172439)
ALIGNMENT = 16  # bytes: grouped products require it of rows and of a tensor's start


class MixtureOfExperts(nn.Module):
    """Replaces a block's MLP. Only `experts` uses the experts' weights, so that expert parallelism can wrap it."""

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.router = Router(width, config)
        self.experts = Experts(config.experts, width, config.width)
        self.shared = SwiGLU(width, config.shared * config.width) if config.shared else None

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y_BTD and the router's loss sums (balance, z). mask_BT is False for padding, which is routed but not counted."""
        weights_NK, chosen_NK, loss_sums = self.router(x_BTD, mask_BT)
        chosen_M = chosen_NK.flatten()
        order_M = chosen_M.argsort(stable=True)
        row_NK = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device)).view_as(chosen_NK)
        counts_E = chosen_M.new_zeros(self.router.experts).scatter_add_(0, chosen_M, torch.ones_like(chosen_M))
        x_MD = _Dispatch.apply(x_BTD.flatten(0, 1), order_M, row_NK)
        y_ND: Tensor = _Combine.apply(self.experts(x_MD, counts_E), weights_NK, order_M, row_NK)
        y_BTD = y_ND.view_as(x_BTD)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD), loss_sums


class Router(nn.Module):
    """Chooses each token's experts, and measures how evenly they are loaded.

    Both auxiliary losses are sums, so that they do not depend on how sequences are split over ranks and micro batches:

    - balance, summed over sequences: E sum_e f_e P_e, where f_e is expert e's share of the sequence's choices and P_e its mean probability
      (Switch transformer, Fedus et al. 2022, section 2.2; per sequence as in DeepSeek-V3, section 2.1.2). 1 if even. Zero unless
      config.balance is "loss".
    - z, summed over tokens: the squared logsumexp of the logits (ST-MoE, Zoph et al. 2022, section 3.2).

    With config.balance "bias", a bias on the choice but not on the weights balances the load (Wang et al. 2024).
    """

    bias: Tensor | None
    sum_over_sequence: Callable[[Tensor], Tensor]

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config, self.experts, self.top_k = config, config.experts, config.top_k
        self.weight = nn.Parameter(torch.empty(config.experts, width))
        nn.init.normal_(self.weight, std=0.02)
        # No buffers, which mixed precision would cast, and never on the meta device. Both move to the weight's device when used.
        self.load = torch.zeros(config.experts, dtype=torch.int64, device="cpu")  # tokens that chose each expert in this step
        self.bias = torch.zeros(config.experts, dtype=torch.float32, device="cpu") if config.balance == "bias" else None
        # If a sequence is split, Ulysses sets the sum over its parts, and the share of its balance loss to count for each part.
        self.sum_over_sequence, self.sequence_share = _identity, 1.0

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights_NK, chosen_NK and the loss sums (balance, z). At least in fp32: a rounded logit changes a token's experts."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            precision = torch.promote_types(torch.promote_types(x_BTD.dtype, self.weight.dtype), torch.float32)
            logits_BTE = F.linear(x_BTD.to(precision), self.weight.to(precision))
            softmax = self.config.score == "softmax"
            scores_BTE = logits_BTE.softmax(dim=-1) if softmax else logits_BTE.sigmoid()
            chosen_BTK = self._choose(scores_BTE.detach())
            weights_BTK = scores_BTE.gather(-1, chosen_BTK)
            if self.config.normalize:
                weights_BTK = _normalized(weights_BTK)
            if mask_BT is None:
                mask_BT = torch.ones_like(chosen_BTK[..., 0], dtype=torch.bool)
            counts_BE = chosen_BTK.new_zeros(len(chosen_BTK), self.experts)
            counts_BE.scatter_add_(1, chosen_BTK.flatten(1), mask_BT.to(counts_BE.dtype).repeat_interleave(chosen_BTK.shape[-1], dim=1))
            if self.training and not _recomputing():
                self.load = self.load.to(counts_BE.device)
                self.load += counts_BE.sum(dim=0)
            z = (logits_BTE.logsumexp(dim=-1).square() * mask_BT).sum()
            balance = torch.zeros_like(z)
            if self.config.balance == "loss":
                balance = self._balance(scores_BTE if softmax else _normalized(scores_BTE), counts_BE, mask_BT)
        return (weights_BTK * self.config.scale).flatten(0, 1), chosen_BTK.flatten(0, 1), torch.stack((balance, z))

    def end_step(self, load_E: Tensor, *, skipped: bool = False) -> None:
        """Update the bias after an optimizer step and reset `load`. load_E: `load` summed over all ranks. skipped: keep the bias."""
        if self.bias is not None and not skipped:
            load_E = load_E.to(torch.int64)
            below_mean = load_E.sum() - self.experts * load_E
            self.bias += self.config.bias_update_speed * below_mean.sign().to(self.bias)
        self.load.zero_()

    def _choose(self, scores_BTE: Tensor) -> Tensor:
        if self.bias is not None:
            self.bias = self.bias.to(scores_BTE.device)
            scores_BTE = scores_BTE + self.bias
        return scores_BTE.topk(self.top_k, dim=-1).indices

    def _balance(self, probabilities_BTE: Tensor, counts_BE: Tensor, mask_BT: Tensor) -> Tensor:
        sums_BE = (probabilities_BTE * mask_BT[..., None]).sum(dim=1)
        tokens_B1 = mask_BT.sum(dim=1, keepdim=True)
        totals = self.sum_over_sequence(torch.cat((sums_BE, counts_BE.to(sums_BE), tokens_B1.to(sums_BE)), dim=1))
        sums_BE, choices_BE, tokens_B1 = totals.split((self.experts, self.experts, 1), dim=1)
        tokens_B1 = tokens_B1.clamp_min(1)  # for a row of padding
        return self.experts * (sums_BE / tokens_B1 * choices_BE / (self.top_k * tokens_B1)).sum() * self.sequence_share


class Experts(nn.Module):
    """E gated MLPs (SwiGLU, Shazeer 2020). Under expert parallelism E is this rank's share."""

    def __init__(self, experts: int, width: int, inner_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, inner_width, width))
        self.up_proj = nn.Parameter(torch.empty(experts, inner_width, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner_width))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """Return y_MD for rows x_MD sorted by expert: counts_E[e] rows belong to expert e."""
        weights = (self.gate_proj, self.up_proj, self.down_proj)
        device = x_MD.device.type
        if torch.is_autocast_enabled(device) and x_MD.dtype != torch.float64:
            precision = torch.get_autocast_dtype(device)
            x_MD, *weights = (tensor.to(precision) for tensor in (x_MD, *weights))
        return _ExpertSwiGLU.apply(x_MD, counts_E.cumsum(0, dtype=torch.int32), *weights)  # type: ignore[no-any-return]


class _ExpertSwiGLU(torch.autograd.Function):
    """Keeps half of the activations that autograd would, computes weights' gradients in the weights' layout, and saves no views."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, ends_E: Tensor, *weights: Tensor) -> Tensor:
        gate_EFD, up_EFD, down_EDF = weights
        gate_MF = _grouped_mm(x_MD, gate_EFD.transpose(1, 2), ends_E)
        up_MF = _grouped_mm(x_MD, up_EFD.transpose(1, 2), ends_E)
        ctx.save_for_backward(x_MD, ends_E, *weights, gate_MF, up_MF)
        return _grouped_mm(F.silu(gate_MF).mul_(up_MF), down_EDF.transpose(1, 2), ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, ends_E, gate_EFD, up_EFD, down_EDF, gate_MF, up_MF = ctx.saved_tensors
        grad_MD = grads[0].contiguous()  # the gradient of a sum is an expanded tensor
        silu_MF = F.silu(gate_MF)
        grad_hidden_MF = _grouped_mm(grad_MD, down_EDF, ends_E)
        grad_down = _grouped_outer(grad_MD, silu_MF * up_MF, ends_E)
        grad_up_MF = silu_MF.mul_(grad_hidden_MF)
        grad_gate_MF = torch.ops.aten.silu_backward(grad_hidden_MF.mul_(up_MF), gate_MF)
        grad_x_MD = (
            _grouped_mm(grad_gate_MF, gate_EFD, ends_E).add_(_grouped_mm(grad_up_MF, up_EFD, ends_E)) if ctx.needs_input_grad[0] else None
        )
        return grad_x_MD, None, _grouped_outer(grad_gate_MF, x_MD, ends_E), _grouped_outer(grad_up_MF, x_MD, ends_E), grad_down


class _Dispatch(torch.autograd.Function):
    """x_MD: each token's row, once for each of its experts. The backward pass gathers rows instead of scattering: it is deterministic."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_M: Tensor, row_NK: Tensor) -> Tensor:
        ctx.save_for_backward(row_NK)
        return x_ND.index_select(0, order_M // row_NK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (row_NK,) = ctx.saved_tensors
        total_ND = grads[0].index_select(0, row_NK[:, 0])
        for row_N in row_NK[:, 1:].unbind(dim=1):  # one at a time: a sum over K of all rows at once reads and writes them twice
            total_ND += grads[0].index_select(0, row_N)
        return total_ND, None, None


class _Combine(torch.autograd.Function):
    """y_ND: the weighted sum of each token's experts, in the router's precision."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, weights_NK: Tensor, order_M: Tensor, row_NK: Tensor) -> Tensor:
        ctx.save_for_backward(y_MD, weights_NK, order_M, row_NK)
        total_ND = weights_NK.new_zeros(len(weights_NK), y_MD.shape[1])
        for row_N, weight_N in zip(row_NK.unbind(dim=1), weights_NK.unbind(dim=1), strict=True):
            total_ND.addcmul_(y_MD.index_select(0, row_N), weight_N[:, None])
        return total_ND.to(y_MD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_MD, weights_NK, order_M, row_NK = ctx.saved_tensors
        grad_MD = grads[0].index_select(0, order_M // row_NK.shape[1])
        grad_weights_M = (grad_MD * y_MD).sum(dim=1, dtype=weights_NK.dtype)
        return grad_MD.mul_(weights_NK.flatten()[order_M, None]), grad_weights_M[row_NK], None, None


def _grouped_mm(x_MI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Return y_MO, every expert's rows times its weight. Expert e's rows end before ends_E[e]."""
    if _is_groupable(x_MI) and _is_groupable(weight_EIO) and weight_EIO.shape[2] * x_MI.element_size() % ALIGNMENT == 0:
        return F.grouped_mm(x_MI, weight_EIO, offs=ends_E)
    rows = x_MI.tensor_split(ends_E[:-1].tolist())
    return torch.cat([x_mI @ weight_IO for x_mI, weight_IO in zip(rows, weight_EIO, strict=True)])


def _grouped_outer(x_MI: Tensor, y_MO: Tensor, ends_E: Tensor) -> Tensor:
    """Return x^T y of every expert's rows, [E, I, O]; zeros for an expert without rows."""
    if _is_groupable(x_MI) and _is_groupable(y_MO):
        product_EIO = F.grouped_mm(x_MI.T, y_MO, offs=ends_E)
        if x_MI.is_cuda and torch.cuda.get_device_capability(x_MI.device)[0] >= BLACKWELL:
            product_EIO.masked_fill_((ends_E.diff(prepend=ends_E.new_zeros(1)) == 0)[:, None, None], 0)
        return product_EIO
    ends = ends_E[:-1].tolist()
    return torch.stack([x_mI.T @ y_mO for x_mI, y_mO in zip(x_MI.tensor_split(ends), y_MO.tensor_split(ends), strict=True)])


def _is_groupable(tensor: Tensor) -> bool:
    """Whether the grouped product supports this tensor."""
    strides = sorted(tensor.stride())[1:]  # the smallest is 1
    aligned = all(stride * tensor.element_size() % ALIGNMENT == 0 for stride in strides) and tensor.data_ptr() % ALIGNMENT == 0
    return tensor.dtype != torch.float64 and tensor.numel() > 0 and aligned


def _normalized(scores: Tensor) -> Tensor:
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)  # all sigmoids may be zero


def _identity(sums: Tensor) -> Tensor:
    return sums


def _recomputing() -> bool:
    """Whether a backward pass is running, which repeats a checkpointed forward pass: its tokens are counted already."""
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
