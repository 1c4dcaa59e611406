"""The parts that decoders are made of.

Shapes: B batch, T time, D model width, N query heads, K key/value heads, H head width, F inner width of the MLP.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manta.trainer.model.attention import Cache, attend

Rotation = tuple[Tensor, Tensor]  # cosine_TH, sine_TH


class RMSNorm(nn.Module):
    """Root mean square layer normalization (Zhang and Sennrich 2019), computed in fp32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.rms_norm(x_BTD.float(), self.weight.shape, eps=self.epsilon).to(x_BTD.dtype) * self.weight


def rotation(head_width: int, theta: float, *, first: int, tokens_BT: Tensor, dtype: torch.dtype) -> Rotation:
    """Rotary position embedding (Su et al. 2021) for positions first, first + 1, …: angles in fp32 whatever the model's precision."""
    device = tokens_BT.device
    frequencies = theta ** -(torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width)
    positions = torch.arange(first, first + tokens_BT.shape[1], dtype=torch.float32, device=device)
    angles_TH = torch.outer(positions, frequencies).repeat(1, 2)
    return angles_TH.cos().to(dtype), angles_TH.sin().to(dtype)


def rotate(x_BNTH: Tensor, turn: Rotation) -> Tensor:
    """Turns the pairs (i, i + H/2), as Hugging Face's Llama does, so that weights go there unchanged."""
    cosine_TH, sine_TH = turn
    first, second = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * cosine_TH + torch.cat((-second, first), dim=-1) * sine_TH


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023)."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.q_proj = nn.Linear(width, heads * self.head_width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.o_proj = nn.Linear(heads * self.head_width, width, bias=False)

    def forward(self, x_BTD: Tensor, turn: Rotation, cache: Cache | None = None) -> Tensor:
        B, T, _ = x_BTD.shape
        # heads are counted from the weight, not the config: tensor parallelism leaves this rank a share of them
        q_BNTH, k_BKTH, v_BKTH = (
            project(x_BTD).view(B, T, -1, self.head_width).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BNTH, k_BKTH = rotate(q_BNTH, turn), rotate(k_BKTH, turn)
        if cache is not None:
            k_BKTH, v_BKTH = cache.extend(k_BKTH, v_BKTH)
        return self.o_proj(attend(q_BNTH, k_BKTH, v_BKTH).transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer 2020)."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner_width, bias=False)
        self.up_proj = nn.Linear(width, inner_width, bias=False)
        self.down_proj = nn.Linear(inner_width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
