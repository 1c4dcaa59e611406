"""GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, LayerNorm, GELU, biases, a tied head."""

from torch import Tensor, nn

from manta.trainer.config.model import ModelConfig
from manta.trainer.model.decoder import Decoder, DecoderBlock
from manta.trainer.model.dropout import Dropout
from manta.trainer.model.layers import MLP, Attention, Pass
from manta.trainer.model.moe import MixtureOfExperts


class Block(DecoderBlock):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.attention = Attention(
            config.width,
            heads=config.heads,
            kv_heads=config.heads,
            head_width=config.each_head,
            bias=True,
            dropout=config.attention_dropout,
        )
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        if config.experts is None:
            self.mlp = MLP(config.width, config.inner, approximate="tanh")
        else:
            self.mlp = MixtureOfExperts(config.width, config.experts)
        self.attention_dropout, self.mlp_dropout = Dropout(config.dropout), Dropout(config.dropout)


class GPT2(Decoder):
    def __init__(self, config: ModelConfig, *, vocabulary: int, sequence_length: int) -> None:
        super().__init__(config, vocabulary=vocabulary)
        self.position_embedding = nn.Embedding(config.positions or sequence_length, config.width)
        self.embedding_dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.finish()

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor, told: Pass) -> tuple[Tensor, Pass]:
        x_BTD = self.embedding(tokens_BT) + self.position_embedding(positions_BT)
        return self.embedding_dropout(x_BTD, told.noise), told
