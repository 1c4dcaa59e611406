"""BERT (Devlin et al. 2019): a post-norm encoder with the two heads of its pretraining.

Shapes: B batch, T time, D model width, V vocabulary, N tokens (batch and time flattened), K loss terms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manta.trainer.config.model import ModelConfig
from manta.trainer.dataloader.batch import IGNORED, Batch
from manta.trainer.model.dropout import Dropout
from manta.trainer.model.layers import MLP, Attention, Embedding, ForwardContext, Head
from manta.trainer.model.losses import classification_loss
from manta.trainer.model.transformer import Transformer, count_targets, padded_vocabulary


class EncoderBlock(nn.Module):
    """A post-norm block, as in the first Transformer (Vaswani et al. 2017): each half adds to the stream and normalizes the sum."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config, bias=True)
        self.attention_norm = nn.LayerNorm(config.width, config.norm_epsilon)
        self.mlp = MLP(config.width, config.inner_width, approximate="none")
        self.mlp_norm = nn.LayerNorm(config.width, config.norm_epsilon)
        self.attention_dropout, self.mlp_dropout = Dropout(config.dropout), Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        x_BTD = self.attention_norm(x_BTD + self.attention_dropout(self.attention(x_BTD, context), context.dropout_keys))
        return self.mlp_norm(x_BTD + self.mlp_dropout(self.mlp(x_BTD), context.dropout_keys))


class Bert(Transformer):
    def __init__(self, config: ModelConfig, *, vocabulary: int, sequence_length: int) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        width, epsilon = config.width, config.norm_epsilon
        self.embedding = Embedding(padded_vocabulary(vocabulary), width)
        self.position_embedding = nn.Embedding(config.positions or sequence_length, width)
        self.segment_embedding = nn.Embedding(2, width)
        self.embedding_norm = nn.LayerNorm(width, epsilon)
        self.embedding_dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.layers))
        self.transform = nn.Linear(width, width)
        self.transform_norm = nn.LayerNorm(width, epsilon)
        self.head = Head(config, self.embedding.weight, vocabulary=vocabulary, bias=True)
        self.pooler = nn.Linear(width, width)
        self.next_sentence = nn.Linear(width, 2)
        self.terms = ("masked_language", "next_sentence", *(("z_loss",) if config.z_loss else ()))
        self.finish()

    def forward(self, batch: Batch, divisors_K: Tensor) -> Tensor:
        """Return terms_K: masked language and next sentence in nats per masked token and per sequence, then the weighted z-loss."""
        targets_N = batch.targets.flatten()
        masked = (targets_N != IGNORED).nonzero()[:, 0]  # waits for the device: at this point its queue is still empty
        x_BTD = self.hidden(batch)
        objective, z = self.head(self.transformed(x_BTD.flatten(0, 1)[masked]), targets_N[masked])
        language = objective - z  # its gradient includes the z-loss's
        sentence = language.detach() * 0
        if batch.next_sentence is not None:
            has_first_token = float(batch.offset == 0)  # if sequences are split over ranks, only the first part has it
            weights_B = torch.full_like(batch.keys, has_first_token, dtype=torch.float32)
            sentence = classification_loss(self.next_sentence_logits(x_BTD), batch.next_sentence, weights_B)
        return torch.stack([language, sentence, *([z] if self.config.z_loss else [])]) / divisors_K

    def counts(self, batch: Batch) -> Tensor:
        tokens = count_targets(batch.targets).cpu()
        pairs = torch.tensor(0) if batch.next_sentence is None else count_targets(batch.next_sentence).cpu()
        return torch.stack([tokens, pairs, *([tokens] if self.config.z_loss else [])])

    def hidden(self, batch: Batch) -> Tensor:
        """Return x_BTD of the last block. Tokens attend to both sides."""
        segments_BT = torch.zeros_like(batch.tokens) if batch.segments is None else batch.segments
        context = self.context(batch, causal=False)
        x_BTD = self.embedding(batch.tokens) + self.position_embedding(batch.positions) + self.segment_embedding(segments_BT)
        x_BTD = self.embedding_dropout(self.embedding_norm(x_BTD), context.dropout_keys)
        for block in self.blocks:
            x_BTD = block(x_BTD, context)
        return x_BTD

    def transformed(self, x: Tensor) -> Tensor:
        """Return the masked-language head's input."""
        return self.transform_norm(F.gelu(self.transform(x)))

    def next_sentence_logits(self, x_BTD: Tensor) -> Tensor:
        """Return logits [B, 2] from the first token: the second part follows the first; it does not."""
        return self.next_sentence(torch.tanh(self.pooler(x_BTD[:, 0])))

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits_BTV of each token, and the next-sentence logits [B, 2]."""
        x_BTD = self.hidden(batch)
        return self.head.logits(self.transformed(x_BTD)), self.next_sentence_logits(x_BTD)

    def flops_per_token(self, sequence_length: int) -> float:
        """The heads compute on masked tokens only, 15 % in the paper, and on the first token of each sequence."""
        language = self.head.weight.numel() + self.transform.weight.numel()
        sentence = self.pooler.weight.numel() + self.next_sentence.weight.numel()
        return super().flops_per_token(sequence_length) - 6.0 * (0.85 * language + (1 - 1 / sequence_length) * sentence)

    def initialize_matrix(self, name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
        """Fill from a normal of deviation 0.02, truncated at two deviations, like BERT's authors."""
        del name
        nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04, generator=generator)
