"""The parts that transformers are made of.

Shapes: B batch, T time, D model width, N query heads, K key/value heads, H head width, F inner width of the MLP, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manta.trainer.model.attention import Cache, Visibility, attend
from manta.trainer.model.dropout import AttentionDropout, Noise
from manta.trainer.model.losses import cross_entropy

Rotation = tuple[Tensor, Tensor]  # cosine_B1TH, sine_B1TH


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What every block of one forward pass is told."""

    visible: Visibility
    noise: Noise | None = None  # None: nothing is dropped
    turn: Rotation | None = None  # None: positions are learned
    real: Tensor | None = None  # [B, T], False for padding; None: there is none


class RMSNorm(nn.Module):
    """Root mean square layer normalization (Zhang and Sennrich 2019), computed in fp32 at least."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide = x_BTD if x_BTD.dtype == torch.float64 else x_BTD.float()
        return F.rms_norm(wide, self.weight.shape, eps=self.epsilon).to(x_BTD.dtype) * self.weight


def rotation(head_width: int, theta: float, positions_BT: Tensor, dtype: torch.dtype) -> Rotation:
    """Rotary position embedding (Su et al. 2021): angles in fp32 whatever the model's precision."""
    frequencies = theta ** -(torch.arange(0, head_width, 2, dtype=torch.float32, device=positions_BT.device) / head_width)
    angles_B1TH = (positions_BT[:, None, :, None].float() * frequencies).repeat(1, 1, 1, 2)
    return angles_B1TH.cos().to(dtype), angles_B1TH.sin().to(dtype)


def rotate(x_BNTH: Tensor, turn: Rotation) -> Tensor:
    """Turns the pairs (i, i + H/2), as Hugging Face's Llama does, so that weights go there unchanged."""
    cosine, sine = turn
    first, second = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * cosine + torch.cat((-second, first), dim=-1) * sine


class Attention(nn.Module):
    """Self-attention with grouped queries (Ainslie et al. 2023)."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int,
        head_width: int,
        bias: bool = False,
        norm_epsilon: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        """norm_epsilon: where given, queries and keys are normalized (Henry et al. 2020). dropout: of the attention weights."""
        super().__init__()
        self.head_width = head_width
        self.q_proj = nn.Linear(width, heads * head_width, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * head_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * head_width, bias=bias)
        self.o_proj = nn.Linear(heads * head_width, width, bias=bias)
        self.q_norm = None if norm_epsilon is None else RMSNorm(head_width, norm_epsilon)
        self.k_norm = None if norm_epsilon is None else RMSNorm(head_width, norm_epsilon)
        self.dropout = AttentionDropout(dropout)
        self.attend = attend  # sequence parallelism puts its own around it

    def forward(self, x_BTD: Tensor, told: Pass, cache: Cache | None = None) -> Tensor:
        B, T, _ = x_BTD.shape
        # heads are counted from the weight, not the config: tensor parallelism leaves this rank a share of them
        q_BNTH, k_BKTH, v_BKTH = (
            project(x_BTD).view(B, T, -1, self.head_width).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BNTH, k_BKTH = self.q_norm(q_BNTH), self.k_norm(k_BKTH)
        if told.turn is not None:
            q_BNTH, k_BKTH = rotate(q_BNTH, told.turn), rotate(k_BKTH, told.turn)
        if cache is not None:
            k_BKTH, v_BKTH = cache.extend(k_BKTH, v_BKTH)
        dropout = self.dropout.under(told.noise)
        return self.o_proj(self.attend(q_BNTH, k_BKTH, v_BKTH, told.visible, dropout=dropout).transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer 2020)."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner_width, bias=False)
        self.up_proj = nn.Linear(width, inner_width, bias=False)
        self.down_proj = nn.Linear(inner_width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class MLP(nn.Module):
    """Two layers with GELU between: its tanh approximation in GPT-2, the exact one in BERT (Hendrycks and Gimpel 2016)."""

    def __init__(self, width: int, inner_width: int, *, approximate: str) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner_width)
        self.down_proj = nn.Linear(inner_width, width)
        self.approximate = approximate

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_BTD), approximate=self.approximate))


class Embedding(nn.Module):
    """A row for each token: V rows, the padding of the vocabulary among them."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight)


class Head(nn.Module):
    """From the last hidden state to the vocabulary, and the loss over it, which never holds all logits at once."""

    def __init__(
        self, weight_VD: nn.Parameter, *, vocabulary: int, bias: bool, soft_cap: float | None, smoothing: float, z_loss: float
    ) -> None:
        """weight_VD: the embedding's, where the two are tied. Rows from `vocabulary` up are padding: no token has them."""
        super().__init__()
        self.weight = weight_VD
        self.bias = nn.Parameter(torch.zeros(len(weight_VD))) if bias else None
        self.vocabulary, self.soft_cap, self.smoothing, self.z_loss = vocabulary, soft_cap, smoothing, z_loss
        self.group: torch.distributed.ProcessGroup | None = None  # of the ranks that share the vocabulary; set from outside

    def forward(self, x_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Summed over the targets: what is minimised, and what of it is the z-loss, without a gradient."""
        return cross_entropy(
            x_ND,
            self.weight,
            targets_N,
            vocabulary=self.vocabulary,
            bias_V=self.bias,
            soft_cap=self.soft_cap,
            smoothing=self.smoothing if self.training else 0.0,
            z_weight=self.z_loss if self.training else 0.0,
            group=self.group,
        )

    def logits(self, x_BTD: Tensor) -> Tensor:
        """-> logits_BTV, without the padding."""
        bias = None if self.bias is None else self.bias[: self.vocabulary]
        logits = F.linear(x_BTD, self.weight[: self.vocabulary], bias)
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)
