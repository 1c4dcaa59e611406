"""BERT (Devlin et al. 2019): a post-norm encoder, with the two heads it is pretrained by.

Shapes: B batch, T time, D model width, V vocabulary, M masked tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manta.trainer.config.model import ModelConfig
from manta.trainer.dataloader.batch import IGNORED, Batch
from manta.trainer.model.attention import Visibility
from manta.trainer.model.dropout import Dropout, Noise
from manta.trainer.model.layers import MLP, Attention, Embedding, Head, Pass
from manta.trainer.model.losses import classify
from manta.trainer.model.transformer import Transformer, padded, predicted


class Block(nn.Module):
    """Post-norm, as in the first Transformer (Vaswani et al. 2017): each half adds to the stream and normalizes the sum."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(
            config.width,
            heads=config.heads,
            kv_heads=config.heads,
            head_width=config.each_head,
            bias=True,
            dropout=config.attention_dropout,
        )
        self.attention_norm = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.mlp = MLP(config.width, config.inner, approximate="none")
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.attention_dropout, self.mlp_dropout = Dropout(config.dropout), Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, told: Pass) -> Tensor:
        x_BTD = self.attention_norm(x_BTD + self.attention_dropout(self.attention(x_BTD, told), told.noise))
        return self.mlp_norm(x_BTD + self.mlp_dropout(self.mlp(x_BTD), told.noise))


class Bert(Transformer):
    def __init__(self, config: ModelConfig, *, vocabulary: int, sequence_length: int) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        width, epsilon = config.width, config.norm_epsilon
        self.embedding = Embedding(padded(vocabulary), width)
        self.position_embedding = nn.Embedding(config.positions or sequence_length, width)
        self.segment_embedding = nn.Embedding(2, width)
        self.embedding_norm = nn.LayerNorm(width, eps=epsilon)
        self.embedding_dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.transform = nn.Linear(width, width)
        self.transform_norm = nn.LayerNorm(width, eps=epsilon)
        weight = self.embedding.weight if config.tied_head else nn.Parameter(torch.empty_like(self.embedding.weight))
        self.head = Head(weight, vocabulary=vocabulary, bias=True, soft_cap=None, smoothing=config.label_smoothing, z_loss=config.z_loss)
        self.pooler = nn.Linear(width, width)
        self.next_sentence = nn.Linear(width, 2)
        self.terms = ("masked_language", "next_sentence", *(("z_loss",) if config.z_loss else ()))
        self.named()

    def forward(self, batch: Batch, divisors_K: Tensor) -> Tensor:
        """-> (masked language, next sentence), in nats a masked token and a sequence, then what keeps logits in bounds, weighted."""
        targets_N = batch.targets.flatten()
        masked = (targets_N != IGNORED).nonzero()[:, 0]  # how many is asked of the device: before it has all the rest to do
        x_BTD = self.hidden(batch)
        objective, z = self.head(self.transformed(x_BTD.flatten(0, 1)[masked]), targets_N[masked])
        language = objective - z  # its gradient is of both
        follows = language.detach() * 0
        if batch.next_sentence is not None:
            begins = float(batch.offset == 0)  # of a sequence cut over ranks, only the first part holds its first token
            follows = classify(self.follows(x_BTD), batch.next_sentence, torch.full_like(batch.keys, begins, dtype=torch.float32))
        return torch.stack([language, follows, *([z] if self.config.z_loss else [])]) / divisors_K

    def counts(self, batch: Batch) -> Tensor:
        tokens = predicted(batch.targets).cpu()
        pairs = torch.tensor(0) if batch.next_sentence is None else predicted(batch.next_sentence).cpu()
        return torch.stack([tokens, pairs, *([tokens] if self.config.z_loss else [])])

    def hidden(self, batch: Batch) -> Tensor:
        """x_BTD of each token, seen from both sides."""
        segments_BT = torch.zeros_like(batch.tokens) if batch.segments is None else batch.segments
        noise = Noise(batch.keys, batch.token_indices) if self.drops else None
        told = Pass(visible=Visibility(causal=False, documents=batch.documents), noise=noise)
        dropped = noise is not None and self.config.attention_dropout > 0
        told.visible.draw(batch.length, batch.length, batch.tokens.device, dropped=dropped)
        x_BTD = self.embedding(batch.tokens) + self.position_embedding(batch.positions) + self.segment_embedding(segments_BT)
        x_BTD = self.embedding_dropout(self.embedding_norm(x_BTD), noise)
        for block in self.blocks:
            x_BTD = block(x_BTD, told)
        return x_BTD

    def transformed(self, x: Tensor) -> Tensor:
        """What the masked-language head reads."""
        return self.transform_norm(F.gelu(self.transform(x)))

    def follows(self, x_BTD: Tensor) -> Tensor:
        """Logits [B, 2] of: the second part follows the first; it does not. Read off the first token."""
        return self.next_sentence(torch.tanh(self.pooler(x_BTD[:, 0])))

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-> logits_BTV of each token, and those [B, 2] of the pair."""
        x_BTD = self.hidden(batch)
        return self.head.logits(self.transformed(x_BTD)), self.follows(x_BTD)

    def flops_per_token(self, sequence_length: int) -> float:
        """The heads see the masked tokens alone, 15 % of them in the paper, and of each sequence its first."""
        language = self.head.weight.numel() + self.transform.weight.numel()
        sentence = self.pooler.weight.numel() + self.next_sentence.weight.numel()
        return super().flops_per_token(sequence_length) - 6.0 * (0.85 * language + (1 - 1 / sequence_length) * sentence)

    def initialize_matrix(self, name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
        """As its authors did: a normal of deviation 0.02, cut off at two deviations."""
        del name
        nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04, generator=generator)
