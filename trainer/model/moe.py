"""A mixture of experts (Shazeer et al. 2017) that drops no token, however unevenly experts are chosen: rows are sorted by expert and
each expert multiplies its own stretch of them, as in MegaBlocks (Gale et al. 2022).

Shapes: B batch, T time, D model width, E experts, F inner width of an expert, K experts a token, N tokens (batch and time in one),
M = N K rows, one for each pair of a token and an expert that it chose. It knows no ranks: what others hold is asked for from outside.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manta.trainer.config.model import ExpertsConfig
from manta.trainer.model.layers import SwiGLU

BLACKWELL = 10  # whose grouped product leaves unwritten what an expert without tokens has (pytorch issue 172439)
ALIGNMENT = 16  # bytes: what grouped products ask of rows and of a tensor's start


class MixtureOfExperts(nn.Module):
    """In place of a block's MLP. `experts` may be replaced by anything that is called as Experts is: nothing else touches their weights."""

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.router = Router(width, config)
        self.experts = Experts(config.experts, width, config.width)
        self.shared = SwiGLU(width, config.shared * config.width) if config.shared else None

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> y_BTD and the sums (balance, z) of Router. mask_BT is False for padding, which is routed but counts for nothing."""
        weights_NK, chosen_NK, auxiliary = self.router(x_BTD, mask_BT)
        chosen_M = chosen_NK.flatten()
        order_M = chosen_M.argsort(stable=True)
        place_NK = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device)).view_as(chosen_NK)
        counts_E = chosen_M.new_zeros(self.router.experts).scatter_add_(0, chosen_M, torch.ones_like(chosen_M))
        x_MD = _Dispatch.apply(x_BTD.flatten(0, 1), order_M, place_NK)
        y_ND: Tensor = _Combine.apply(self.experts(x_MD, counts_E), weights_NK, order_M, place_NK)
        y_BTD = y_ND.view_as(x_BTD)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD), auxiliary


class Router(nn.Module):
    """Chooses experts, and measures how evenly.

    Both auxiliary losses are sums, so that they do not depend on how sequences are dealt to ranks and micro batches:

    - balance, over sequences: E sum_e f_e P_e, where f_e is the share of a sequence's choices that fell on expert e and P_e its mean
      probability (Switch transformer, Fedus et al. 2022, section 2.2; a sequence at a time as in DeepSeek-V3, section 2.1.2). 1 when even.
      Zero unless config.balance is "loss".
    - z, over tokens: the squared logsumexp of the logits (ST-MoE, Zoph et al. 2022, section 3.2).

    With config.balance "bias" a bias on the choice, not on the weights, keeps experts even (Wang et al. 2024).
    """

    bias: Tensor | None
    sum_over_sequence: Callable[[Tensor], Tensor]

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config, self.experts, self.top_k = config, config.experts, config.top_k
        self.weight = nn.Parameter(torch.empty(config.experts, width))
        nn.init.normal_(self.weight, std=0.02)
        # neither is a buffer, which mixed precision would cast, and neither is made on the meta device; both follow the weight when used
        self.load = torch.zeros(config.experts, dtype=torch.int64, device="cpu")  # tokens that chose each expert since settle()
        self.bias = torch.zeros(config.experts, dtype=torch.float32, device="cpu") if config.balance == "bias" else None
        # where a sequence lies on several ranks: sums what they hold of it, and which share of its loss is counted here
        self.sum_over_sequence, self.sequence_share = _alone, 1.0

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """-> weights_NK, chosen_NK and the sums (balance, z). In fp32 at least: a rounded logit sends a token elsewhere."""
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
            taken_BE = chosen_BTK.new_zeros(len(chosen_BTK), self.experts)
            taken_BE.scatter_add_(1, chosen_BTK.flatten(1), mask_BT.to(taken_BE.dtype).repeat_interleave(chosen_BTK.shape[-1], dim=1))
            if self.training and not _recomputing():
                self.load = self.load.to(taken_BE.device)
                self.load += taken_BE.sum(dim=0)
            z = (logits_BTE.logsumexp(dim=-1).square() * mask_BT).sum()
            balance = torch.zeros_like(z)
            if self.config.balance == "loss":
                balance = self._balance(scores_BTE if softmax else _normalized(scores_BTE), taken_BE, mask_BT)
        return (weights_BTK * self.config.scale).flatten(0, 1), chosen_BTK.flatten(0, 1), torch.stack((balance, z))

    def settle(self, load_E: Tensor, *, learned: bool = True) -> None:
        """After an optimizer step. load_E: `load`, summed over all ranks. learned: False where the step was left out."""
        if self.bias is not None and learned:
            load_E = load_E.to(torch.int64)
            below_mean = load_E.sum() - self.experts * load_E
            self.bias += self.config.bias_update_speed * below_mean.sign().to(self.bias)
        self.load.zero_()

    def _choose(self, scores_BTE: Tensor) -> Tensor:
        if self.bias is not None:
            self.bias = self.bias.to(scores_BTE.device)
            scores_BTE = scores_BTE + self.bias
        return scores_BTE.topk(self.top_k, dim=-1).indices

    def _balance(self, probabilities_BTE: Tensor, taken_BE: Tensor, mask_BT: Tensor) -> Tensor:
        sums_BE = (probabilities_BTE * mask_BT[..., None]).sum(dim=1)
        tokens_B1 = mask_BT.sum(dim=1, keepdim=True)
        whole = self.sum_over_sequence(torch.cat((sums_BE, taken_BE.to(sums_BE), tokens_B1.to(sums_BE)), dim=1))
        sums_BE, shares_BE, tokens_B1 = whole.split((self.experts, self.experts, 1), dim=1)
        tokens_B1 = tokens_B1.clamp_min(1)  # a row of padding alone
        return self.experts * (sums_BE / tokens_B1 * shares_BE / (self.top_k * tokens_B1)).sum() * self.sequence_share


class Experts(nn.Module):
    """E gated MLPs (SwiGLU, Shazeer 2020), or as many of them as are held here: the weights tell."""

    def __init__(self, experts: int, width: int, inner_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, inner_width, width))
        self.up_proj = nn.Parameter(torch.empty(experts, inner_width, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner_width))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """x_MD: rows sorted by expert, of which expert e has counts_E[e] -> y_MD in the same order."""
        weights = (self.gate_proj, self.up_proj, self.down_proj)
        device = x_MD.device.type
        if torch.is_autocast_enabled(device) and x_MD.dtype != torch.float64:
            precision = torch.get_autocast_dtype(device)
            x_MD, *weights = (tensor.to(precision) for tensor in (x_MD, *weights))
        return _ExpertSwiGLU.apply(x_MD, counts_E.cumsum(0, dtype=torch.int32), *weights)  # type: ignore[no-any-return]


class _ExpertSwiGLU(torch.autograd.Function):
    """Keeps half of what autograd would, takes weights' gradients in their own layout, and saves the weights themselves, not views."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, ends_E: Tensor, *weights: Tensor) -> Tensor:
        gate_EFD, up_EFD, down_EDF = weights
        gate_MF = _each(x_MD, gate_EFD.transpose(1, 2), ends_E)
        up_MF = _each(x_MD, up_EFD.transpose(1, 2), ends_E)
        ctx.save_for_backward(x_MD, ends_E, *weights, gate_MF, up_MF)
        return _each(F.silu(gate_MF).mul_(up_MF), down_EDF.transpose(1, 2), ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, ends_E, gate_EFD, up_EFD, down_EDF, gate_MF, up_MF = ctx.saved_tensors
        grad_MD = grads[0].contiguous()  # the gradient of a sum comes expanded
        silu_MF = F.silu(gate_MF)
        grad_hidden_MF = _each(grad_MD, down_EDF, ends_E)
        grad_down = _outer(grad_MD, silu_MF * up_MF, ends_E)
        grad_up_MF = silu_MF.mul_(grad_hidden_MF)
        grad_gate_MF = torch.ops.aten.silu_backward(grad_hidden_MF.mul_(up_MF), gate_MF)
        grad_x_MD = _each(grad_gate_MF, gate_EFD, ends_E).add_(_each(grad_up_MF, up_EFD, ends_E)) if ctx.needs_input_grad[0] else None
        return grad_x_MD, None, _outer(grad_gate_MF, x_MD, ends_E), _outer(grad_up_MF, x_MD, ends_E), grad_down


class _Dispatch(torch.autograd.Function):
    """x_MD: each token's row, once for each of its experts. Backwards, rows are fetched, not scattered: the same sum every time."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_M: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(place_NK)
        return x_ND.index_select(0, order_M // place_NK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (place_NK,) = ctx.saved_tensors
        total_ND = grads[0].index_select(0, place_NK[:, 0])
        for place_N in place_NK[:, 1:].unbind(dim=1):  # one at a time: a sum over K of all rows at once reads and writes them twice
            total_ND += grads[0].index_select(0, place_N)
        return total_ND, None, None


class _Combine(torch.autograd.Function):
    """y_ND: what a token's experts gave, weighed and summed in the router's precision."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, weights_NK: Tensor, order_M: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(y_MD, weights_NK, order_M, place_NK)
        total_ND = weights_NK.new_zeros(len(weights_NK), y_MD.shape[1])
        for place_N, weight_N in zip(place_NK.unbind(dim=1), weights_NK.unbind(dim=1), strict=True):
            total_ND.addcmul_(y_MD.index_select(0, place_N), weight_N[:, None])
        return total_ND.to(y_MD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_MD, weights_NK, order_M, place_NK = ctx.saved_tensors
        grad_MD = grads[0].index_select(0, order_M // place_NK.shape[1])
        grad_weights_M = (grad_MD * y_MD).sum(dim=1, dtype=weights_NK.dtype)
        return grad_MD.mul_(weights_NK.flatten()[order_M, None]), grad_weights_M[place_NK], None, None


def _each(x_MI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """-> y_MO: every expert's rows times its weight. Expert e's rows end before ends_E[e]."""
    if _groups(x_MI) and _groups(weight_EIO) and weight_EIO.shape[2] * x_MI.element_size() % ALIGNMENT == 0:
        return F.grouped_mm(x_MI, weight_EIO, offs=ends_E)
    parts = x_MI.tensor_split(ends_E[:-1].tolist())
    return torch.cat([x_mI @ weight_IO for x_mI, weight_IO in zip(parts, weight_EIO, strict=True)])


def _outer(x_MI: Tensor, y_MO: Tensor, ends_E: Tensor) -> Tensor:
    """-> x^T y for every expert's rows, EIO: zeros where it has none."""
    if _groups(x_MI) and _groups(y_MO):
        product_EIO = F.grouped_mm(x_MI.T, y_MO, offs=ends_E)
        if x_MI.is_cuda and torch.cuda.get_device_capability(x_MI.device)[0] >= BLACKWELL:
            product_EIO.masked_fill_((ends_E.diff(prepend=ends_E.new_zeros(1)) == 0)[:, None, None], 0)
        return product_EIO
    cuts = ends_E[:-1].tolist()
    return torch.stack([x_mI.T @ y_mO for x_mI, y_mO in zip(x_MI.tensor_split(cuts), y_MO.tensor_split(cuts), strict=True)])


def _groups(tensor: Tensor) -> bool:
    """Whether the grouped product takes it."""
    strides = sorted(tensor.stride())[1:]  # the least is 1
    aligned = all(stride * tensor.element_size() % ALIGNMENT == 0 for stride in strides) and tensor.data_ptr() % ALIGNMENT == 0
    return tensor.dtype != torch.float64 and tensor.numel() > 0 and aligned


def _normalized(scores: Tensor) -> Tensor:
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoids may all be zero


def _alone(sums: Tensor) -> Tensor:
    return sums


def _recomputing() -> bool:
    """Whether a backward pass is under way, which runs a checkpointed forward pass again: its tokens have been counted."""
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
