"""The base class of all models: how they return a loss, and how their weights are initialized.

A model is single-device code. It returns each loss term as a sum over the micro batch, divided by a number that it is given: how many items
the whole step holds, per rank over which gradients are averaged. So each item has the same weight in the step, wherever it is read.
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
from manta.trainer.model.attention import AttentionMask
from manta.trainer.model.dropout import AttentionDropout, Dropout, DropoutKeys, name_dropouts
from manta.trainer.model.layers import Attention, ForwardContext
from manta.trainer.model.moe import MixtureOfExperts, Router


class Transformer(nn.Module, ABC):
    """The base class of every model, including the user's.

    A subclass sets `terms` and `blocks`, defines `forward(batch, divisors_K) -> terms_K` and `counts(batch) -> K numbers`, and ends its
    constructor with `finish()`.
    """

    terms: tuple[str, ...]
    """Names of the K loss terms. train/loss is the sum of those in neither `auxiliary` nor `metrics`."""
    auxiliary: ClassVar[frozenset[str]] = AUXILIARY
    """Terms that are minimized, but are not part of the reported loss; logged in training only."""
    metrics: ClassVar[frozenset[str]] = frozenset()
    """Terms that are only measured, without a gradient; logged in training and in evaluation."""
    blocks: nn.ModuleList
    """Activation checkpointing and compilation apply to each block separately."""

    @abstractmethod
    def forward(self, batch: Batch, divisors_K: Tensor) -> Tensor:
        """Return terms_K, each loss term summed over the batch and divided by its divisor, at least in fp32."""

    @abstractmethod
    def counts(self, batch: Batch) -> Tensor:
        """Return how many items of each loss term the batch holds: K numbers, on the CPU or the batch's device."""

    def finish(self) -> None:
        """Do what depends on module names. Call this once all modules exist."""
        name_dropouts(self)

    def routers(self) -> Iterator[tuple[str, Router]]:
        return ((name, module) for name, module in self.named_modules() if isinstance(module, Router))

    def initialize(self, seed: int) -> None:
        """Set initial weights, which depend only on (seed, name): no layout changes them. Norms start at 1, biases at 0."""
        for name, parameter in self.named_parameters():
            self.initialize_parameter(name, parameter, seed)

    def initialize_parameter(self, name: str, parameter: nn.Parameter, seed: int) -> None:
        if parameter.ndim < 2:
            nn.init.constant_(parameter, 1.0 if name.endswith("norm.weight") else 0.0)
            return
        generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()) >> 1)
        self.initialize_matrix(name, parameter, generator)

    def initialize_matrix(self, name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
        """Fill from a normal of deviation 0.02, scaled by 1/sqrt(2 layers) if it writes to the residual stream (GPT-2, section 2.3)."""
        residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
        deviation = 0.02 / math.sqrt(2 * len(self.blocks)) if residual else 0.02
        nn.init.normal_(parameter, std=deviation, generator=generator)

    def context(self, batch: Batch, *, causal: bool = True, window: int | None = None) -> ForwardContext:
        """Return what the blocks need in training and evaluation, with the mask prepared."""
        dropouts = [module for module in self.modules() if isinstance(module, Dropout | AttentionDropout) and module.rate > 0]
        keys = DropoutKeys(batch.keys, batch.token_indices) if self.training and dropouts else None
        drops_attention = keys is not None and any(isinstance(module, AttentionDropout) for module in dropouts)
        mask = AttentionMask(batch.length, batch.length, batch.tokens.device, causal=causal, window=window, documents=batch.documents)
        mask.prepare(dropout=drops_attention)
        return ForwardContext(mask=mask, dropout_keys=keys, token_mask=batch.real)

    def flops_per_token(self, sequence_length: int) -> float:
        """Return forward and backward floating-point operations per token after PaLM (Chowdhery et al. 2022), appendix B: 6 N + 12 L T D.

        N excludes weights that are looked up and not multiplied, and a mixture's experts that a token does not use.
        """
        used = {id(p): float(p.numel()) for p in self.parameters()}
        for module in self.modules():
            if isinstance(module, MixtureOfExperts):
                share = module.router.top_k / module.router.experts
                used |= {id(p): p.numel() * share for p in module.experts.parameters()}
        named = list(self.named_parameters(remove_duplicate=False))
        used |= {id(parameter): 0.0 for name, parameter in named if name.endswith("embedding.weight")}
        used |= {id(parameter): float(parameter.numel()) for name, parameter in named if name == "head.weight"}
        attention = [module for module in self.modules() if isinstance(module, Attention)]
        return 6.0 * sum(used.values()) + 12.0 * sequence_length * sum(module.o_proj.in_features for module in attention)


def padded_vocabulary(vocabulary: int) -> int:
    """Return the number of rows of embedding and head."""
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def count_targets(targets: Tensor) -> Tensor:
    """Return how many targets are not IGNORED."""
    return (targets != IGNORED).sum()
