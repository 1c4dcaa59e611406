"""A decoder in the Llama manner (Touvron et al. 2023): pre-norm blocks of rotary grouped-query attention and SwiGLU.

Shapes: B batch, T time, D model width, V vocabulary. Single-device code: it knows no ranks.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from manta.trainer.config import ModelConfig
from manta.trainer.model.attention import Cache
from manta.trainer.model.layers import Attention, RMSNorm, Rotation, SwiGLU, rotation
from manta.trainer.model.losses import cross_entropy

VOCABULARY_MULTIPLE = 128  # embedding rows are padded to this, the same for every layout


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config.width, config.heads, config.kv_heads)
        self.mlp_norm = RMSNorm(config.width, config.norm_epsilon)
        self.mlp = SwiGLU(config.width, config.mlp_width)

    def forward(self, x_BTD: Tensor, turn: Rotation, cache: Cache | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), turn, cache)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class GPT(nn.Module):
    def __init__(self, config: ModelConfig, *, vocabulary: int) -> None:
        """vocabulary: the tokenizer's size; the embedding is padded to a multiple of VOCABULARY_MULTIPLE."""
        super().__init__()
        padded = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        self.config, self.vocabulary = config, padded
        self.embedding = nn.Embedding(padded, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.head = None if config.tied_head else nn.Linear(config.width, padded, bias=False)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The mean loss over targets_BT, in nats a token."""
        return cross_entropy(self.hidden(tokens_BT).flatten(0, 1), self.head_weight, targets_BT.flatten())

    def logits(self, tokens_BT: Tensor, *, first: int = 0, caches: Sequence[Cache] | None = None) -> Tensor:
        """-> logits_BTV. `first`: the position of the first token; `caches`, one a layer, hold what came before it."""
        return F.linear(self.hidden(tokens_BT, first=first, caches=caches), self.head_weight)

    def hidden(self, tokens_BT: Tensor, *, first: int = 0, caches: Sequence[Cache] | None = None) -> Tensor:
        """What the head reads: x_BTD."""
        x_BTD = self.embedding(tokens_BT)
        turn = rotation(self.config.head_width, self.config.rope_theta, first=first, tokens_BT=tokens_BT, dtype=x_BTD.dtype)
        for index, block in enumerate(self.layers):
            x_BTD = block(x_BTD, turn, None if caches is None else caches[index])
        return self.norm(x_BTD)

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def initialize(self, seed: int) -> None:
        """Normal weights of deviation 0.02; those that write to the residual stream by 1/sqrt(2 layers) less (GPT-2, section 2.3).

        A weight's value depends on (seed, name) alone: no layout changes it.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                nn.init.ones_(parameter)
                continue
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            deviation = 0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02
            generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()) >> 1)
            nn.init.normal_(parameter, std=deviation, generator=generator)


def flops_per_token(model: GPT, sequence_length: int) -> float:
    """Forward and backward floating point operations a token, after PaLM (Chowdhery et al. 2022), appendix B: 6 N + 12 L T D.

    N leaves out the embedding's look-up, which multiplies nothing, unless its weight is the head's too.
    """
    config = model.config
    lookup = 0 if config.tied_head else model.embedding.weight.numel()
    parameters = sum(p.numel() for p in model.parameters()) - lookup
    return 6.0 * parameters + 12.0 * config.layers * sequence_length * config.width
