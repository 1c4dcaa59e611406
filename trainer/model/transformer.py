"""What all our models have in common: how they are asked for a loss, and how they begin.

A model is single-device code and knows no ranks. It gives each term of its loss as a sum over what the batch holds, divided by
how many such things the whole step holds: so padding that differs between ranks and micro batches weighs what it should.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
import xxhash
from torch import Tensor, nn

from manta.trainer.config.supported import VOCABULARY_MULTIPLE
from manta.trainer.dataloader.batch import IGNORED, Batch
from manta.trainer.metrics import AUXILIARY
from manta.trainer.model.dropout import AttentionDropout, Dropout, name_dropouts
from manta.trainer.model.layers import Attention
from manta.trainer.model.moe import MixtureOfExperts, Router


def padded(vocabulary: int) -> int:
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


class Transformer(nn.Module, ABC):
    """The base of every model, and of yours.

    A subclass sets `terms` and `blocks`, and defines `forward(batch, divisors_K) -> terms_K` and `counts(batch) -> K numbers`.
    """

    terms: tuple[str, ...]
    """Names of the K terms of the loss. train/loss is the sum of those that `auxiliary` does not name."""
    auxiliary: ClassVar[frozenset[str]] = AUXILIARY
    blocks: nn.ModuleList
    """What is recomputed, and compiled, one by one."""

    @abstractmethod
    def forward(self, batch: Batch, divisors_K: Tensor) -> Tensor:
        """Each term summed over the batch and divided by its divisor: terms_K, in fp32 at least."""

    @abstractmethod
    def counts(self, batch: Batch) -> Tensor:
        """How much of each term this batch holds: K numbers, on the CPU or the batch's device."""

    def routers(self) -> Iterator[tuple[str, Router]]:
        return ((name, module) for name, module in self.named_modules() if isinstance(module, Router))

    def initialize(self, seed: int) -> None:
        """A weight's first value depends on (seed, name) alone: no layout changes it. Norms begin as 1, biases as 0."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                nn.init.constant_(parameter, 1.0 if name.endswith("norm.weight") else 0.0)
                continue
            generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()) >> 1)
            self.initialize_matrix(name, parameter, generator)

    def initialize_matrix(self, name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
        """Normal, of deviation 0.02; those that write to the residual stream by 1/sqrt(2 layers) less (GPT-2, section 2.3)."""
        residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
        deviation = 0.02 / math.sqrt(2 * len(self.blocks)) if residual else 0.02
        nn.init.normal_(parameter, std=deviation, generator=generator)

    def named(self) -> None:
        """Once all modules stand: what depends on their names."""
        name_dropouts(self)

    @property
    def drops(self) -> bool:
        """Whether this pass drops anything."""
        return self.training and any(isinstance(module, Dropout | AttentionDropout) and module.rate > 0 for module in self.modules())

    def flops_per_token(self, sequence_length: int) -> float:
        """Forward and backward floating point operations a token, after PaLM (Chowdhery et al. 2022), appendix B: 6 N + 12 L T D.

        N leaves out what is looked up and not multiplied, and of a mixture's experts all but those that a token goes to.
        """
        used = {id(p): float(p.numel()) for p in self.parameters()}
        for module in self.modules():
            if isinstance(module, MixtureOfExperts):
                share = module.router.top_k / module.router.experts
                used |= {id(p): p.numel() * share for p in module.experts.parameters()}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if name.endswith("embedding.weight"):
                used[id(parameter)] = 0.0
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if name == "head.weight":
                used[id(parameter)] = float(parameter.numel())
        attention = [module for module in self.modules() if isinstance(module, Attention)]
        return 6.0 * sum(used.values()) + 12.0 * sequence_length * sum(module.o_proj.in_features for module in attention)


def predicted(targets: Tensor) -> Tensor:
    """How many targets are to be predicted."""
    return (targets != IGNORED).sum()
