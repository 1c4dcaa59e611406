"""Llama (Touvron et al. 2023): pre-norm blocks of rotary grouped-query attention and SwiGLU.

Optionally with normalized queries and keys, capped logits, and attention within a window.
"""

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from manta.trainer.config.model import ModelConfig
from manta.trainer.model.decoder import Decoder, DecoderBlock
from manta.trainer.model.dropout import Dropout
from manta.trainer.model.layers import ForwardContext, RMSNorm, SwiGLU, rotary_embedding


class Llama(Decoder):
    def __init__(self, config: ModelConfig, *, vocabulary: int, sequence_length: int) -> None:
        """sequence_length: unused, since rotary positions have no limit."""
        del sequence_length
        super().__init__(config, vocabulary=vocabulary)
        self.embedding_dropout = Dropout(config.dropout)
        mlp = partial(SwiGLU, config.width, config.inner_width)
        self.blocks = nn.ModuleList(DecoderBlock(config, norm=RMSNorm, mlp=mlp) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.finish()

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor, context: ForwardContext) -> tuple[Tensor, ForwardContext]:
        x_BTD = self.embedding(tokens_BT)
        rotary = rotary_embedding(self.config.head_dim, self.config.rope_theta, positions_BT, x_BTD.dtype)
        return self.embedding_dropout(x_BTD, context.dropout_keys), replace(context, rotary=rotary)
