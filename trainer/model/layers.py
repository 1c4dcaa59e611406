"""The layers that our transformers are built from.

Shapes: B batch, T time, D model width, N query heads, K key/value heads, H head width, F inner width of the MLP, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manta.trainer.config.model import ModelConfig
from manta.trainer.model.attention import AttentionMask, KVCache, attend
from manta.trainer.model.dropout import AttentionDropout, DropoutKeys
from manta.trainer.model.losses import Criterion, TokenLosses, VocabularyShard, cross_entropy

Rotary = tuple[Tensor, Tensor]  # cosine_B1TH, sine_B1TH


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardContext:
    """What every block of one forward pass needs besides the hidden states."""

    mask: AttentionMask
    dropout_keys: DropoutKeys | None = None  # None: nothing is dropped
    rotary: Rotary | None = None  # None: positions are learned
    token_mask: Tensor | None = None  # [B, T], False for padding; None: there is no padding


class RMSNorm(nn.Module):
    """Root mean square layer normalization (Zhang and Sennrich 2019), computed at least in fp32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide = x_BTD if x_BTD.dtype == torch.float64 else x_BTD.float()
        return F.rms_norm(wide, self.weight.shape, eps=self.epsilon).to(x_BTD.dtype) * self.weight


def rotary_embedding(head_width: int, theta: float, positions_BT: Tensor, dtype: torch.dtype) -> Rotary:
    """Return the rotary position embedding (Su et al. 2021). Angles are in fp32 in every precision."""
    frequencies = theta ** -(torch.arange(0, head_width, 2, dtype=torch.float32, device=positions_BT.device) / head_width)
    angles_B1TH = (positions_BT[:, None, :, None].float() * frequencies).repeat(1, 1, 1, 2)
    return angles_B1TH.cos().to(dtype), angles_B1TH.sin().to(dtype)


def apply_rotary(x_BNTH: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the pairs (i, i + H/2), like Hugging Face's Llama, so that weights can be exported unchanged."""
    cosine, sine = rotary
    first, second = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * cosine + torch.cat((-second, first), dim=-1) * sine


class Attention(nn.Module):
    """Self-attention with grouped queries (Ainslie et al. 2023) and, with `qk_norm`, normalized queries and keys (Henry et al. 2020)."""

    def __init__(self, config: ModelConfig, *, bias: bool = False) -> None:
        super().__init__()
        self.head_width = config.head_dim
        queries, keys = config.heads * self.head_width, config.kv * self.head_width
        self.q_proj = nn.Linear(config.width, queries, bias=bias)
        self.k_proj = nn.Linear(config.width, keys, bias=bias)
        self.v_proj = nn.Linear(config.width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.width, bias=bias)
        self.q_norm = RMSNorm(self.head_width, config.norm_epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_width, config.norm_epsilon) if config.qk_norm else None
        self.dropout = AttentionDropout(config.attention_dropout)
        self.attend: Callable[..., Tensor] = attend  # Ulysses wraps it
        self.measured: list[Tensor] | None = None  # a list: the largest logit of each forward pass is appended to it

    def forward(self, x_BTD: Tensor, context: ForwardContext, cache: KVCache | None = None) -> Tensor:
        B, T, _ = x_BTD.shape
        # The number of heads follows from the weight and not from the config: tensor parallelism leaves this rank a share of them.
        q_BNTH, k_BKTH, v_BKTH = (
            project(x_BTD).view(B, T, -1, self.head_width).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BNTH, k_BKTH = self.q_norm(q_BNTH), self.k_norm(k_BKTH)
        if context.rotary is not None:
            q_BNTH, k_BKTH = apply_rotary(q_BNTH, context.rotary), apply_rotary(k_BKTH, context.rotary)
        if cache is not None:
            k_BKTH, v_BKTH = cache.append(k_BKTH, v_BKTH)
        options = {"dropout": self.dropout.bind(context.dropout_keys), "measured": self.measured}
        return self.o_proj(self.attend(q_BNTH, k_BKTH, v_BKTH, context.mask, **options).transpose(1, 2).reshape(B, T, -1))


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
    """Two layers with GELU (Hendrycks and Gimpel 2016) between them: its tanh approximation in GPT-2, the exact one in BERT."""

    def __init__(self, width: int, inner_width: int, *, approximate: str) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner_width)
        self.down_proj = nn.Linear(inner_width, width)
        self.approximate = approximate

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_BTD), approximate=self.approximate))


class Embedding(nn.Module):
    """One row per token: V rows, the padding of the vocabulary included."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight)


class Head(nn.Module):
    """The output layer over the vocabulary, and its loss, which never has all logits in memory at once."""

    def __init__(self, config: ModelConfig, embedding_VD: nn.Parameter, *, vocabulary: int, bias: bool) -> None:
        """embedding_VD: shared as the head's weight if `tied_head` is set. Rows from `vocabulary` on are padding without a token."""
        super().__init__()
        self.weight = embedding_VD if config.tied_head else nn.Parameter(torch.empty_like(embedding_VD))
        self.bias = nn.Parameter(torch.zeros(len(embedding_VD))) if bias else None
        self.vocabulary, self.soft_cap = vocabulary, config.logit_soft_cap
        self.smoothing, self.z_loss = config.label_smoothing, config.z_loss
        self.shard: VocabularyShard | None = None  # tensor parallelism sets it
        self.measured: list[TokenLosses] | None = None  # a list: what is measured of each target is appended to it

    def forward(self, x_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums over the targets: the quantity to minimize, and its z-loss part, without a gradient."""
        smoothing, z_weight = (self.smoothing, self.z_loss) if self.training else (0.0, 0.0)
        criterion = Criterion(vocabulary=self.vocabulary, soft_cap=self.soft_cap, smoothing=smoothing, z_weight=z_weight, shard=self.shard)
        return cross_entropy(x_ND, self.weight, targets_N, criterion, bias_V=self.bias, measured=self.measured)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Return logits_BTV, without the padding."""
        bias = None if self.bias is None else self.bias[: self.vocabulary]
        logits = F.linear(x_BTD, self.weight[: self.vocabulary], bias)
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)
