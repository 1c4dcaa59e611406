"""A decoder with parallel attention and MLP, as in GPT-J (Wang and Komatsuzaki 2021), and squared ReLU (So et al. 2021).

Shapes: B batch, T time, D model width.
"""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from manta.data.errors import InputError
from manta.trainer.config.model import ModelConfig
from manta.trainer.model.attention import KVCache
from manta.trainer.model.decoder import Decoder
from manta.trainer.model.dropout import Dropout
from manta.trainer.model.layers import Attention, ForwardContext, RMSNorm, rotary_embedding


class PoweredMLP(nn.Module):
    """ReLU to a power, 2 by default."""

    def __init__(self, width: int, inner_width: int, power: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner_width, bias=False)
        self.down_proj = nn.Linear(inner_width, width, bias=False)
        self.power = power

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x_BTD)).pow(self.power))


def power_of(config: ModelConfig) -> int:
    power = config.options.get("power", 2)
    if not isinstance(power, int):
        raise InputError(f"model.options.power: expected a whole number, got {power!r}. Use 2.")
    return power


class Block(nn.Module):
    """Attention and MLP read the same norm, and neither waits for the other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config)
        self.mlp = PoweredMLP(config.width, config.inner_width, power_of(config))  # inner_width: mlp_width or its default
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, context: ForwardContext, cache: KVCache | None = None) -> tuple[Tensor, None]:
        y_BTD = self.norm(x_BTD)
        return x_BTD + self.dropout(self.attention(y_BTD, context, cache) + self.mlp(y_BTD), context.dropout_keys), None


class Parallel(Decoder):
    def __init__(self, config: ModelConfig, *, vocabulary: int, sequence_length: int) -> None:
        del sequence_length  # rotary positions have no limit
        super().__init__(config, vocabulary=vocabulary)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.finish()

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor, context: ForwardContext) -> tuple[Tensor, ForwardContext]:
        x_BTD = self.embedding(tokens_BT)
        rotary = rotary_embedding(self.config.head_dim, self.config.rope_theta, positions_BT, x_BTD.dtype)
        return x_BTD, replace(context, rotary=rotary)
