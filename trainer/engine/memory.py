"""Memory of the model's state on each rank, by ZeRO's formula.

ZeRO (Rajbhandari et al. 2020), sections 3.1 and 5: with P weights trained in 16 bits by Adam, a rank holds 2P bytes of weights, 2P of
gradients and KP, K = 12, of optimizer state: 4 for the fp32 master copy, 4 for each moment. On N ranks

    stage 0: 2P + 2P + KP       stage 1: 2P + 2P + KP/N       stage 2: 2P + (2 + K)P/N       stage 3: (2 + 2 + K)P/N

The paper considers only mixed precision. In fp32, and with autocast, weights and gradients take 4P each and K is still 12: DeepSpeed
keeps a master copy of fp32 weights as well. In stage 0 a weight is its own master, and K = 8. SGD's momentum is one moment. P counts this
rank's shard under tensor (Megatron-LM) and expert parallelism. N is the number of ranks that hold the same weights, fewer for experts.
With ZeRO-Offload (Ren et al. 2021) the KP bytes are in CPU memory. Activations, buckets and temporary buffers are not included.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from manta.trainer.config.sections import Precision
from manta.trainer.dist.layout import Layout, WeightShard
from manta.trainer.parallel.sharding import is_sharded, local_slices

MOMENTS = {"adamw": 2, "sgd": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one rank."""

    weights: int
    gradients: int  # from the backward pass to the optimizer's step
    masters: int  # the fp32 copy
    optimizer: int  # the moments
    offloaded: bool = False

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.optimizer

    @property
    def host(self) -> int:
        """The part of the total in CPU memory beside a GPU."""
        return self.masters + self.optimizer if self.offloaded else 0

    @property
    def device(self) -> int:
        return self.total - self.host


def estimate_memory(
    shapes: Mapping[str, Sequence[int]], layout: Layout, precision: Precision, optimizer: Literal["adamw", "sgd"]
) -> MemoryEstimate:
    """Return the memory of the model's state on one rank, the same for every rank. shapes: each weight's global shape, by name."""
    shard = WeightShard(tensor=(0, layout.tensor), expert=(0, layout.expert))
    whole, partitioned = 0, 0  # elements on this rank: without, and with ZeRO's partitioning over replicas
    for name, shape in shapes.items():
        size = math.prod(local.stop - local.start for local in local_slices(name, shape, shard))
        replicas = layout.replicas // (layout.expert if is_sharded(name, shard, "expert") else 1)
        whole += size
        partitioned += -(-size // replicas)
    is_fp32 = precision in ("fp32", "bf16-autocast")
    width = 4 if is_fp32 else 2
    return MemoryEstimate(
        weights=width * (partitioned if layout.zero >= 3 else whole),
        gradients=width * (partitioned if layout.zero >= 2 else whole),
        masters=4 * partitioned if layout.zero >= 1 else 0 if is_fp32 else 4 * whole,
        optimizer=4 * MOMENTS[optimizer] * (partitioned if layout.zero >= 1 else whole),
        offloaded=layout.offload,
    )
