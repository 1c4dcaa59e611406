"""How much of a rank's memory the model's state takes: ZeRO's formula, as code that estimates go by.

ZeRO (Rajbhandari et al. 2020), sections 3.1 and 5: with P weights trained in 16 bits by Adam, a rank holds 2P bytes of weights, 2P of
gradients and KP, K = 12, of what the optimizer needs: 4 for the fp32 master copy, 4 for each moment. On N ranks

    stage 0: 2P + 2P + KP       stage 1: 2P + 2P + KP/N       stage 2: 2P + (2 + K)P/N       stage 3: (2 + 2 + K)P/N

The paper speaks of mixed precision alone. In fp32, and so under autocast, the same counting gives 4P, 4P and K = 12 still: DeepSpeed
keeps a master copy of fp32 weights too, but for stage 0, where a weight is its own master and K = 8. SGD's momentum is one moment. P is
what tensor ranks (Megatron-LM) and expert ranks leave of the whole, and N counts the ranks that hold the same weights, which are fewer for
experts. With ZeRO-Offload (Ren et al. 2021), what K stands for lies in CPU memory. Activations, buckets and what a step needs for a moment
come on top.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from manta.trainer.config.model import ModelConfig
from manta.trainer.config.training import Precision
from manta.trainer.dist import sharding
from manta.trainer.dist.layout import Layout

MOMENTS = {"adamw": 2, "sgd": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes that one rank holds."""

    weights: int
    gradients: int  # from backward to the optimizer's step
    masters: int  # the fp32 copy
    optimizer: int  # the moments
    offloaded: bool = False

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.optimizer

    @property
    def host(self) -> int:
        """Of the total, what lies in CPU memory beside a GPU."""
        return self.masters + self.optimizer if self.offloaded else 0

    @property
    def device(self) -> int:
        return self.total - self.host


def estimate(
    shapes: Mapping[str, Sequence[int]],
    layout: Layout,
    precision: Precision,
    optimizer: Literal["adamw", "sgd"],
) -> Memory:
    """shapes: of each weight, by its name, the whole one. What one rank holds of the model's state; every rank holds as much."""
    part = sharding.Part(tensor=(0, layout.tensor), expert=(0, layout.expert))
    held, shares = 0, 0  # elements: all ZeRO replicas hold them, or each its share
    for name, whole in shapes.items():
        size = math.prod(there.stop - there.start for there in sharding.local(name, whole, part))
        replicas = layout.replicas // (layout.expert if sharding.is_cut(name, part, "expert") else 1)
        held += size
        shares += -(-size // replicas)
    exact = precision in ("fp32", "bf16-autocast")
    width = 4 if exact else 2
    return Memory(
        weights=width * (shares if layout.zero >= 3 else held),
        gradients=width * (shares if layout.zero >= 2 else held),
        masters=4 * shares if layout.zero >= 1 else 0 if exact else 4 * held,
        optimizer=4 * MOMENTS[optimizer] * (shares if layout.zero >= 1 else held),
        offloaded=layout.offload,
    )


def shapes(config: ModelConfig, *, vocabulary: int, sequence_length: int) -> dict[str, tuple[int, ...]]:
    """Of each weight, by its name, the whole shape. Nothing is allocated: the model is built on the meta device."""
    import torch

    from manta.trainer.model.build import build

    with torch.device("meta"):
        model = build(config, vocabulary=vocabulary, sequence_length=sequence_length)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
