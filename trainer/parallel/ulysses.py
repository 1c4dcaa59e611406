"""Sequence parallelism (DeepSpeed-Ulysses, Jacobs et al. 2023): each rank of a group holds a part of every sequence.

Everything but attention goes token by token. For attention the ranks exchange: each takes all tokens of its share of the heads, and
gives back its part of the tokens with all heads. To ZeRO these ranks are data ranks like any others: they hold the same
weights, and tokens of their own.

Shapes: B batch, T tokens here, S = P T tokens of the whole sequence, N heads, H head width, P ranks of the group.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from manta.trainer.dist.collectives import exchange, total
from manta.trainer.model.attention import Visibility
from manta.trainer.model.layers import Attention
from manta.trainer.model.moe import Router


def share(model: nn.Module, group: ProcessGroup) -> None:
    for module in model.modules():
        match module:
            case Attention():
                module.attend = UlyssesAttention(module.attend, group)
                heads = len(module.q_proj.weight) // module.head_width // dist.get_world_size(group)
                module.dropout.first_head += dist.get_rank(group) * heads
            case Router():  # its balance loss looks at whole sequences
                module.sum_over_sequence = lambda sums: total(sums, group)
                module.sequence_share = 1 / dist.get_world_size(group)
            case _:
                pass


class UlyssesAttention:
    """Attention over whole sequences, for this rank's share of the heads."""

    def __init__(self, attend: Any, group: ProcessGroup) -> None:
        self.attend, self.group = attend, group

    def __call__(self, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, visible: Visibility, *, dropout: Any = None) -> Tensor:
        """All three of this rank's tokens."""
        q_BNSH, k_BKSH, v_BKSH = (heads_for_tokens(x, self.group) for x in (q_BNTH, k_BKSH, v_BKSH))
        return tokens_for_heads(self.attend(q_BNSH, k_BKSH, v_BKSH, visible, dropout=dropout), self.group)


def heads_for_tokens(x_BNTH: Tensor, group: ProcessGroup) -> Tensor:
    """All heads of this rank's tokens -> this rank's heads of all tokens: [B, N/P, S, H]."""
    ranks = dist.get_world_size(group)
    B, N, T, H = x_BNTH.shape
    sent = x_BNTH.view(B, ranks, N // ranks, T, H).transpose(0, 1)
    came = exchange(sent, [1] * ranks, [1] * ranks, group)  # [P, B, N/P, T, H]: the P-th rank's tokens
    return came.permute(1, 2, 0, 3, 4).reshape(B, N // ranks, ranks * T, H)


def tokens_for_heads(x_BNSH: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's heads of all tokens [B, N/P, S, H] -> all heads of this rank's tokens: [B, N, T, H]."""
    ranks = dist.get_world_size(group)
    B, N, S, H = x_BNSH.shape
    sent = x_BNSH.view(B, N, ranks, S // ranks, H).permute(2, 0, 1, 3, 4)
    came = exchange(sent, [1] * ranks, [1] * ranks, group)  # [P, B, N/P, T, H]: the P-th rank's heads
    return came.transpose(0, 1).reshape(B, ranks * N, S // ranks, H)
