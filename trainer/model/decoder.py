"""What decoders share: a causal stack of blocks, a head over the vocabulary, and their loss terms.

Shapes: B batch, T time, D model width, V vocabulary, K loss terms.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from manta.trainer.config.model import ModelConfig
from manta.trainer.dataloader.batch import Batch
from manta.trainer.model.attention import AttentionMask, KVCache
from manta.trainer.model.dropout import Dropout
from manta.trainer.model.layers import Attention, Embedding, ForwardContext, Head
from manta.trainer.model.moe import MixtureOfExperts
from manta.trainer.model.transformer import Transformer, count_targets, padded_vocabulary


class DecoderBlock(nn.Module):
    """A pre-norm block: each half normalizes the residual stream and adds its output to it."""

    def __init__(
        self, config: ModelConfig, *, norm: Callable[[int, float], nn.Module], mlp: Callable[[], nn.Module], bias: bool = False
    ) -> None:
        """mlp: builds the MLP; a mixture of experts replaces it if the config has one. bias: of the attention's projections."""
        super().__init__()
        self.attention_norm = norm(config.width, config.norm_epsilon)
        self.attention = Attention(config, bias=bias)
        self.mlp_norm = norm(config.width, config.norm_epsilon)
        self.mlp = mlp() if config.experts is None else MixtureOfExperts(config.width, config.experts)
        self.attention_dropout, self.mlp_dropout = Dropout(config.dropout), Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, context: ForwardContext, cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        """Return x_BTD and, from a mixture, the loss sums (balance, router z)."""
        keys = context.dropout_keys
        x_BTD = x_BTD + self.attention_dropout(self.attention(self.attention_norm(x_BTD), context, cache), keys)
        if isinstance(self.mlp, MixtureOfExperts):
            y_BTD, loss_sums = self.mlp(self.mlp_norm(x_BTD), context.token_mask)
        else:
            y_BTD, loss_sums = self.mlp(self.mlp_norm(x_BTD)), None
        return x_BTD + self.mlp_dropout(y_BTD, keys), loss_sums


class Decoder(Transformer):
    """The base class of decoders. A subclass sets `blocks` and `norm`, defines `embed`, and ends its constructor with `finish()`."""

    norm: nn.Module

    def __init__(self, config: ModelConfig, *, vocabulary: int) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.embedding = Embedding(padded_vocabulary(vocabulary), config.width)

    def finish(self) -> None:
        self.head = Head(self.config, self.embedding.weight, vocabulary=self.vocabulary, bias=False)
        self.has_mixture = any(isinstance(module, MixtureOfExperts) for module in self.modules())
        self.terms = ("loss", *(("z_loss",) if self.config.z_loss else ()), *(("balance", "router_z") if self.has_mixture else ()))
        super().finish()

    def forward(self, batch: Batch, divisors_K: Tensor) -> Tensor:
        """Return terms_K: the loss in nats per token, then the weighted z-loss, balance loss and router z-loss."""
        x_BTD, mixture = self.hidden(batch)
        objective, z = self.head(x_BTD.flatten(0, 1), batch.targets.flatten())
        sums = [objective - z]  # its gradient includes the z-loss's
        if self.config.z_loss:
            sums.append(z)
        if mixture is not None:
            experts = self.config.experts
            assert experts is not None, "the mixture was built from it"
            balance, router_z = mixture
            sums += [experts.balance_weight * balance if experts.balance == "loss" else balance.detach() * 0]
            sums += [experts.router_z_loss * router_z]
        assert len(sums) == len(self.terms), "each term has its divisor"
        return torch.stack(sums) / divisors_K

    def counts(self, batch: Batch) -> Tensor:
        targets = count_targets(batch.targets)
        counts = [targets] * (1 + bool(self.config.z_loss))
        if self.has_mixture:
            tokens = torch.tensor(batch.tokens.numel()) if batch.real is None else batch.real.sum()
            counts += [torch.tensor(len(batch.tokens)), tokens]
        return torch.stack([count.cpu() for count in counts])

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the head's input x_BTD, and a mixture's loss sums over all blocks."""
        return self.run_blocks(batch.tokens, batch.positions, self.context(batch, window=self.config.sliding_window))

    def logits(self, tokens_BT: Tensor, *, first: int = 0, caches: Sequence[KVCache] | None = None) -> Tensor:
        """Return logits_BTV. first: the position of the first token. caches: one per block, with the keys and values before it."""
        T, device = tokens_BT.shape[1], tokens_BT.device
        positions_BT = torch.arange(first, first + T, device=device).expand_as(tokens_BT)
        context = ForwardContext(mask=AttentionMask(T, first + T, device, window=self.config.sliding_window))
        return self.head.logits(self.run_blocks(tokens_BT, positions_BT, context, caches)[0])

    def run_blocks(
        self, tokens_BT: Tensor, positions_BT: Tensor, context: ForwardContext, caches: Sequence[KVCache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        x_BTD, context = self.embed(tokens_BT, positions_BT, context)
        sums: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x_BTD, loss_sums = block(x_BTD, context, None if caches is None else caches[index])
            sums += [] if loss_sums is None else [loss_sums]
        return self.norm(x_BTD), torch.stack(sums).sum(dim=0) if sums else None

    @abstractmethod
    def embed(self, tokens_BT: Tensor, positions_BT: Tensor, context: ForwardContext) -> tuple[Tensor, ForwardContext]:
        """Return x_BTD, and the context with what the blocks need of positions."""
