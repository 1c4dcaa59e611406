"""A decoder in the Llama manner (Touvron et al. 2023): pre-norm blocks of rotary grouped-query attention and SwiGLU.

With queries and keys normalized, logits capped, and attention within a window, where the config asks for it.
"""

from dataclasses import replace

from torch import Tensor, nn

from manta.trainer.config.model import ModelConfig
from manta.trainer.model.decoder import Decoder, DecoderBlock
from manta.trainer.model.dropout import Dropout
from manta.trainer.model.layers import Attention, Pass, RMSNorm, SwiGLU, rotation
from manta.trainer.model.moe import MixtureOfExperts


class Block(DecoderBlock):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = Attention(
            config.width,
            heads=config.heads,
            kv_heads=config.kv,
            head_width=config.each_head,
            norm_epsilon=config.norm_epsilon if config.qk_norm else None,
            dropout=config.attention_dropout,
        )
        self.mlp_norm = RMSNorm(config.width, config.norm_epsilon)
        self.mlp = SwiGLU(config.width, config.inner) if config.experts is None else MixtureOfExperts(config.width, config.experts)
        self.attention_dropout, self.mlp_dropout = Dropout(config.dropout), Dropout(config.dropout)


class Llama(Decoder):
    def __init__(self, config: ModelConfig, *, vocabulary: int, sequence_length: int) -> None:
        """vocabulary: the tokenizer's size. Rotary positions have no end: sequence_length is not needed."""
        del sequence_length
        super().__init__(config, vocabulary=vocabulary)
        self.embedding_dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.finish()

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor, told: Pass) -> tuple[Tensor, Pass]:
        x_BTD = self.embedding(tokens_BT)
        turn = rotation(self.config.each_head, self.config.rope_theta, positions_BT, x_BTD.dtype)
        return self.embedding_dropout(x_BTD, told.noise), replace(told, turn=turn)
