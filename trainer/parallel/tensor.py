"""Tensor parallelism (Megatron-LM, Shoeybi et al. 2019): heads, inner widths and the vocabulary, shared by a group of ranks.

Where a layer begins, its input is copied to the group; where its rows end, their products are summed over it. All ranks of a
group read the same tokens.
"""

from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from manta.trainer.dist.collectives import copy, reduce
from manta.trainer.model.layers import MLP, Attention, Embedding, Head, SwiGLU
from manta.trainer.model.moe import Experts


def share(model: nn.Module, group: ProcessGroup) -> None:
    """Puts the exchanges around the layers, whose weights have been cut already."""
    for module in list(model.modules()):
        match module:
            case Attention():
                module.register_forward_pre_hook(_enter(group))
                module.o_proj.forward = RowProduct(module.o_proj, group)
                module.dropout.first_head = dist.get_rank(group) * (len(module.q_proj.weight) // module.head_width)
                for norm in (module.q_norm, module.k_norm):
                    if norm is not None:  # whole on each rank, and used for this rank's heads alone
                        norm.weight.register_hook(_summed(group))
            case SwiGLU() | MLP():
                module.register_forward_pre_hook(_enter(group))
                module.down_proj.forward = RowProduct(module.down_proj, group)
            case Experts():
                module.register_forward_pre_hook(_enter(group))
                module.register_forward_hook(_leave(group))
            case Embedding():
                module.forward = VocabularyLookup(module, group)
            case Head():
                module.register_forward_pre_hook(_enter(group))
                module.group = group
            case _:
                pass


class RowProduct:
    """A linear layer whose input is cut over the group: the products are summed, and then the bias is added, once."""

    def __init__(self, linear: nn.Linear, group: ProcessGroup) -> None:
        self.linear, self.group = linear, group

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002  as nn.Linear names it
        y, bias = reduce(F.linear(input, self.linear.weight), self.group), self._bias
        return y if bias is None else y + bias

    @property
    def _bias(self) -> Tensor | None:
        return self.linear.bias


class VocabularyLookup:
    """Each rank looks up the tokens whose rows it holds; the others it leaves at zero, and the sum has them all."""

    def __init__(self, embedding: Embedding, group: ProcessGroup) -> None:
        self.embedding, self.group = embedding, group

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        weight_VD = self.embedding.weight
        here_BT = tokens_BT - dist.get_rank(self.group) * len(weight_VD)
        elsewhere_BT = (here_BT < 0) | (here_BT >= len(weight_VD))
        x_BTD = F.embedding(here_BT.masked_fill(elsewhere_BT, 0), weight_VD)
        return reduce(x_BTD.masked_fill(elsewhere_BT[..., None], 0.0), self.group)


def _enter(group: ProcessGroup) -> Any:
    def hook(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (copy(given[0], group), *given[1:])

    return hook


def _leave(group: ProcessGroup) -> Any:
    def hook(_: nn.Module, __: object, result: Tensor) -> Tensor:
        return reduce(result, group)

    return hook


def _summed(group: ProcessGroup) -> Any:
    def hook(gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=group)
        return gradient

    return hook
