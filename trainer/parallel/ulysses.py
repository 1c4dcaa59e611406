"""Sequence parallelism (DeepSpeed-Ulysses, Jacobs et al. 2023): each rank of a group holds a part of every sequence.

All layers but attention work token by token. For attention the ranks exchange: each computes its share of the heads over all tokens, and
returns all heads of its own tokens. For ZeRO these ranks are data ranks: they hold the same weights and different tokens.

Shapes: B batch, T tokens of this rank, S = P T tokens of the whole sequence, N heads, H head width, P ranks of the group.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from manta.trainer.model.layers import Attention
from manta.trainer.model.moe import Router
from manta.trainer.parallel.collectives import all_reduce, all_to_all


def apply_ulysses(model: nn.Module, group: ProcessGroup) -> None:
    for module in model.modules():
        match module:
            case Attention():
                module.attend = partial(ulysses_attention, module.attend, group)
                heads = len(module.q_proj.weight) // module.head_width // dist.get_world_size(group)
                module.dropout.first_head += dist.get_rank(group) * heads
            case Router():  # its balance loss is defined on whole sequences
                module.sum_over_sequence = partial(all_reduce, group=group)
                module.sequence_share = 1 / dist.get_world_size(group)
            case _:
                pass


def ulysses_attention(
    attend: Callable[..., Tensor], group: ProcessGroup, q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Attention over whole sequences, for this rank's share of the heads. q, k, v: of this rank's tokens."""
    q_BNSH, k_BKSH, v_BKSH = (split_heads(x, group) for x in (q_BNTH, k_BKTH, v_BKTH))
    return split_tokens(attend(q_BNSH, k_BKSH, v_BKSH, *args, **kwargs), group)


def split_heads(x_BNTH: Tensor, group: ProcessGroup) -> Tensor:
    """All heads of this rank's tokens -> this rank's heads of all tokens: [B, N/P, S, H]."""
    ranks = dist.get_world_size(group)
    B, N, T, H = x_BNTH.shape
    sent = x_BNTH.view(B, ranks, N // ranks, T, H).transpose(0, 1)
    received = all_to_all(sent, [1] * ranks, [1] * ranks, group)  # [P, B, N/P, T, H]: the tokens of rank P
    return received.permute(1, 2, 0, 3, 4).reshape(B, N // ranks, ranks * T, H)


def split_tokens(x_BNSH: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's heads of all tokens [B, N/P, S, H] -> all heads of this rank's tokens: [B, N, T, H]."""
    ranks = dist.get_world_size(group)
    B, N, S, H = x_BNSH.shape
    sent = x_BNSH.view(B, N, ranks, S // ranks, H).permute(2, 0, 1, 3, 4)
    received = all_to_all(sent, [1] * ranks, [1] * ranks, group)  # [P, B, N/P, T, H]: the heads of rank P
    return received.transpose(0, 1).reshape(B, ranks * N, S // ranks, H)
