"""What decoders share: a causal stack of blocks, a head over the vocabulary, and the terms of their loss.

Shapes: B batch, T time, D model width, V vocabulary, K terms of the loss.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from manta.trainer.config.model import ModelConfig
from manta.trainer.dataloader.batch import Batch
from manta.trainer.model.attention import Cache, Visibility
from manta.trainer.model.dropout import Noise
from manta.trainer.model.layers import Embedding, Head, Pass
from manta.trainer.model.moe import MixtureOfExperts
from manta.trainer.model.transformer import Transformer, padded, predicted


class DecoderBlock(nn.Module):
    """Pre-norm: each half reads a norm of the residual stream and adds to it. A subclass builds the four parts and the dropouts."""

    attention_norm: nn.Module
    attention: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module
    attention_dropout: nn.Module
    mlp_dropout: nn.Module

    def forward(self, x_BTD: Tensor, told: Pass, cache: Cache | None = None) -> tuple[Tensor, Tensor | None]:
        """-> x_BTD and, from a mixture, the sums (balance, router z)."""
        x_BTD = x_BTD + self.attention_dropout(self.attention(self.attention_norm(x_BTD), told, cache), told.noise)
        branch = self.mlp(self.mlp_norm(x_BTD), told.real) if isinstance(self.mlp, MixtureOfExperts) else self.mlp(self.mlp_norm(x_BTD))
        y_BTD, sums = branch if isinstance(branch, tuple) else (branch, None)
        return x_BTD + self.mlp_dropout(y_BTD, told.noise), sums


class Decoder(Transformer):
    """A subclass builds `blocks`, `norm` and what its positions need, then calls `finish`."""

    norm: nn.Module

    def __init__(self, config: ModelConfig, *, vocabulary: int) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.embedding = Embedding(padded(vocabulary), config.width)

    def finish(self) -> None:
        config, tied = self.config, self.embedding.weight
        weight = tied if config.tied_head else nn.Parameter(torch.empty_like(tied))
        self.head = Head(
            weight,
            vocabulary=self.vocabulary,
            bias=False,
            soft_cap=config.logit_soft_cap,
            smoothing=config.label_smoothing,
            z_loss=config.z_loss,
        )
        self.has_mixture = any(isinstance(module, MixtureOfExperts) for module in self.modules())
        mixture = ("balance", "router_z") if self.has_mixture else ()
        self.terms = ("loss", *(("z_loss",) if config.z_loss else ()), *mixture)
        self.named()

    def forward(self, batch: Batch, divisors_K: Tensor) -> Tensor:
        """-> terms_K: loss in nats a token, then what keeps logits, load and router in bounds, weighted."""
        config = self.config
        x_BTD, mixture = self.hidden(batch)
        objective, z = self.head(x_BTD.flatten(0, 1), batch.targets.flatten())
        sums = [objective - z]  # its gradient is of both
        if config.z_loss:
            sums.append(z)
        if mixture is not None:
            assert config.experts is not None, "a mixture was built by it"
            balance, router_z = mixture
            sums += [config.experts.balance_weight * balance if config.experts.balance == "loss" else balance.detach() * 0]
            sums += [config.experts.router_z_loss * router_z]
        assert len(sums) == len(self.terms), "each term has its divisor"
        return torch.stack(sums) / divisors_K

    def counts(self, batch: Batch) -> Tensor:
        tokens = predicted(batch.targets)
        counts = [tokens] * (1 + bool(self.config.z_loss))
        if self.has_mixture:
            tokens = torch.tensor(batch.tokens.numel()) if batch.real is None else batch.real.sum()
            counts += [torch.tensor(len(batch.tokens)), tokens]
        return torch.stack([count.cpu() for count in counts])

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the head reads, x_BTD, and a mixture's sums over all blocks."""
        visible = Visibility(window=self.config.sliding_window, documents=batch.documents)
        noise = Noise(batch.keys, batch.token_indices) if self.drops else None
        dropped = noise is not None and self.config.attention_dropout > 0
        visible.draw(batch.length, batch.length, batch.tokens.device, dropped=dropped)
        return self.stack(batch.tokens, batch.positions, visible, noise=noise, real=batch.real)

    def logits(self, tokens_BT: Tensor, *, first: int = 0, caches: Sequence[Cache] | None = None) -> Tensor:
        """-> logits_BTV. `first`: the position of the first token; `caches`, one a block, hold what came before it."""
        positions_BT = torch.arange(first, first + tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        x_BTD, _ = self.stack(tokens_BT, positions_BT, Visibility(window=self.config.sliding_window), caches=caches)
        return self.head.logits(x_BTD)

    def stack(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        visible: Visibility,
        *,
        noise: Noise | None = None,
        real: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        x_BTD, told = self.embed(tokens_BT, positions_BT, Pass(visible=visible, noise=noise, real=real))
        sums: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x_BTD, mixture = block(x_BTD, told, None if caches is None else caches[index])
            sums += [] if mixture is None else [mixture]
        return self.norm(x_BTD), torch.stack(sums).sum(dim=0) if sums else None

    @abstractmethod
    def embed(self, tokens_BT: Tensor, positions_BT: Tensor, told: Pass) -> tuple[Tensor, Pass]:
        """x_BTD, and what the blocks are told of positions."""
