"""Tensor parallelism (Megatron-LM, Shoeybi et al. 2019): a group of ranks shares heads, inner widths and the vocabulary.

The first matrix of a layer is split by columns, the second by rows: its products are summed over the group (all-reduce). All ranks of a
group read the same tokens. trainer/parallel/sharding.py lists which weight is split where.
"""

from functools import partial
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from manta.trainer.model.layers import MLP, Attention, Embedding, Head, SwiGLU
from manta.trainer.model.losses import VocabularyShard
from manta.trainer.model.moe import Experts
from manta.trainer.parallel.collectives import copy_to_group, reduce_from_group


def apply_tensor_parallel(model: nn.Module, group: ProcessGroup) -> None:
    """Add the collectives to layers with sharded weights."""
    for module in list(model.modules()):
        if isinstance(module, Attention | SwiGLU | MLP | Experts | Head):
            module.register_forward_pre_hook(partial(_copy_input, group))
        match module:
            case Attention():
                module.o_proj.forward = partial(_row_parallel, module.o_proj, group)
                module.dropout.first_head = dist.get_rank(group) * (len(module.q_proj.weight) // module.head_width)
                for norm in (module.q_norm, module.k_norm):
                    if norm is not None:  # whole on each rank, but its gradient comes from this rank's heads only
                        norm.weight.register_hook(partial(_sum_gradient, group))
            case SwiGLU() | MLP():
                module.down_proj.forward = partial(_row_parallel, module.down_proj, group)
            case Experts():
                module.register_forward_hook(partial(_reduce_output, group))
            case Embedding():
                module.forward = partial(_embed_vocabulary, module, group)
            case Head():
                module.shard = vocabulary_shard(group)
            case _:
                pass


def vocabulary_shard(group: ProcessGroup) -> VocabularyShard:
    """Return this rank's shard of the vocabulary, for the loss."""
    return VocabularyShard(
        index=group.rank(),
        count=group.size(),
        reduce_max=partial(dist.all_reduce, op=dist.ReduceOp.MAX, group=group),
        reduce_sum=partial(dist.all_reduce, group=group),
    )


def _row_parallel(linear: nn.Linear, group: ProcessGroup, input: Tensor) -> Tensor:  # noqa: A002  nn.Linear's name
    """A linear layer with an input sharded over the group: sum the products, then add the bias once."""
    y = reduce_from_group(F.linear(input, linear.weight), group)
    bias: Any = linear.bias
    return y if bias is None else y + bias


def _embed_vocabulary(embedding: Embedding, group: ProcessGroup, tokens_BT: Tensor) -> Tensor:
    """Look up the tokens in this rank's rows and leave the others zero; the sum over the group is complete."""
    weight_VD = embedding.weight
    local_BT = tokens_BT - dist.get_rank(group) * len(weight_VD)
    remote_BT = (local_BT < 0) | (local_BT >= len(weight_VD))
    x_BTD = F.embedding(local_BT.masked_fill(remote_BT, 0), weight_VD)
    return reduce_from_group(x_BTD.masked_fill(remote_BT[..., None], 0.0), group)


def _copy_input(group: ProcessGroup, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (copy_to_group(inputs[0], group), *inputs[1:])


def _reduce_output(group: ProcessGroup, _: nn.Module, __: object, output: Tensor) -> Tensor:
    return reduce_from_group(output, group)


def _sum_gradient(group: ProcessGroup, gradient: Tensor) -> Tensor:
    gradient = gradient.contiguous()
    dist.all_reduce(gradient, group=group)
    return gradient
