"""A decoder whose blocks attend and compute at once, as in GPT-J (Wang and Komatsuzaki 2021), with squared ReLU (So et al. 2021).

Shapes: B batch, T time, D model width, F inner width.
"""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from manta.data.errors import InputError
from manta.trainer.config.model import ModelConfig
from manta.trainer.model.attention import Cache
from manta.trainer.model.decoder import Decoder
from manta.trainer.model.dropout import Dropout
from manta.trainer.model.layers import Attention, Pass, RMSNorm, rotation


class PoweredMLP(nn.Module):
    """ReLU to a power: 2 unless model.options says otherwise."""

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
        raise InputError(f"model.options.power: got {power!r}, wants a whole number; 2 is customary")
    return power


class Block(nn.Module):
    """One norm for both halves: neither waits for the other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config.width, heads=config.heads, kv_heads=config.kv, head_width=config.each_head)
        self.mlp = PoweredMLP(config.width, config.inner, power_of(config))
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, told: Pass, cache: Cache | None = None) -> tuple[Tensor, None]:
        y_BTD = self.norm(x_BTD)
        return x_BTD + self.dropout(self.attention(y_BTD, told, cache) + self.mlp(y_BTD), told.noise), None


class Parallel(Decoder):
    def __init__(self, config: ModelConfig, *, vocabulary: int, sequence_length: int) -> None:
        del sequence_length  # rotary positions have no end
        super().__init__(config, vocabulary=vocabulary)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.finish()

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor, told: Pass) -> tuple[Tensor, Pass]:
        x_BTD = self.embedding(tokens_BT)
        turn = rotation(self.config.each_head, self.config.rope_theta, positions_BT, x_BTD.dtype)
        return x_BTD, replace(told, turn=turn)
