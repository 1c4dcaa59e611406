"""GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, LayerNorm, GELU, biases, a tied head."""

from functools import partial

from torch import Tensor, nn

from manta.trainer.config.model import ModelConfig
from manta.trainer.model.decoder import Decoder, DecoderBlock
from manta.trainer.model.dropout import Dropout
from manta.trainer.model.layers import MLP, ForwardContext


class GPT2(Decoder):
    def __init__(self, config: ModelConfig, *, vocabulary: int, sequence_length: int) -> None:
        super().__init__(config, vocabulary=vocabulary)
        self.position_embedding = nn.Embedding(config.positions or sequence_length, config.width)
        self.embedding_dropout = Dropout(config.dropout)
        mlp = partial(MLP, config.width, config.inner_width, approximate="tanh")
        self.blocks = nn.ModuleList(DecoderBlock(config, norm=nn.LayerNorm, mlp=mlp, bias=True) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.norm_epsilon)
        self.finish()

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor, context: ForwardContext) -> tuple[Tensor, ForwardContext]:
        x_BTD = self.embedding(tokens_BT) + self.position_embedding(positions_BT)
        return self.embedding_dropout(x_BTD, context.dropout_keys), context
