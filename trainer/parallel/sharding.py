"""Sharding specs: which weights are split over which ranks. Parallel layers, checkpoints and memory estimates all read this table.

Specs match the names of our layers' weights. A weight that matches none is whole on every rank. A user's model is not sharded: its
weights may have these names with another meaning.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from manta.trainer.dist.layout import WeightShard

Axis = Literal["tensor", "expert"]


class ShardingSpec(NamedTuple):
    """Weights with a full name that matches `pattern` are split into equal shards on `dimension`, over the ranks of `axis`."""

    pattern: str
    axis: Axis
    dimension: int


SPECS = (
    # Megatron-LM (Shoeybi et al. 2019), section 3: columns, then rows, so that each half of a block needs one all-reduce.
    ShardingSpec(r".*\.(q|k|v|gate|up)_proj\.(weight|bias)", "tensor", 0),
    ShardingSpec(r".*\.(o|down)_proj\.weight", "tensor", 1),
    # The vocabulary: embedding and head, tied or not.
    ShardingSpec(r"(embedding|head)\.(weight|bias)", "tensor", 0),
    # A mixture: by experts (GShard, Lepikhin et al. 2021, section 3.2), and each expert like an MLP.
    ShardingSpec(r".*\.experts\.(gate|up|down)_proj", "expert", 0),
    ShardingSpec(r".*\.experts\.(gate|up)_proj", "tensor", 1),
    ShardingSpec(r".*\.experts\.down_proj", "tensor", 2),
)


def specs_of(name: str) -> list[ShardingSpec]:
    return [spec for spec in SPECS if re.fullmatch(spec.pattern, name)]


def is_sharded(name: str, shard: WeightShard, axis: Axis) -> bool:
    """Whether this weight is split over the ranks of this axis."""
    return getattr(shard, axis)[1] > 1 and any(spec.axis == axis for spec in specs_of(name))


def local_slices(name: str, shape: Sequence[int], shard: WeightShard) -> tuple[slice, ...]:
    """Return the part of a weight of global `shape` that this shard holds. Raises ValueError if it does not split evenly."""
    slices = [slice(0, size) for size in shape]
    for spec in specs_of(name):
        index, count = getattr(shard, spec.axis)
        size, remainder = divmod(shape[spec.dimension], count)
        if remainder:
            raise ValueError(f"{name}: expected dimension {spec.dimension} of {tuple(shape)} to split into {count} equal shards.")
        slices[spec.dimension] = slice(index * size, (index + 1) * size)
    return tuple(slices)


def global_shape(name: str, local_shape: Sequence[int], shard: WeightShard) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the global shape of a weight, and the offsets of this shard in it."""
    shape, offsets = list(local_shape), [0] * len(local_shape)
    for spec in specs_of(name):
        index, count = getattr(shard, spec.axis)
        shape[spec.dimension] *= count
        offsets[spec.dimension] = index * local_shape[spec.dimension]
    return tuple(shape), tuple(offsets)
