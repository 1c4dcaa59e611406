"""The exchanges that parallel layers are made of, each with its gradient."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def copy(x: Tensor, group: ProcessGroup) -> Tensor:
    """Gives x as it is; its gradient is summed over the group, each rank of which has used x for something else."""
    return _Copy.apply(x, group)  # type: ignore[no-any-return]


def reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of x over the group, on every rank of it; each rank goes on alike, so the gradient is taken as it is."""
    return _Reduce.apply(x, group)  # type: ignore[no-any-return]


def total(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of x over the group, where each rank goes on with a share of the loss: the gradient is summed too."""
    return reduce(copy(x, group), group)


def exchange(x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
    """Rows x [sum(sent), …] to the ranks of the group, sent[r] of them to the r-th; gives those that came: [sum(received), …]."""
    return _Exchange.apply(x, list(sent), list(received), group)  # type: ignore[no-any-return]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        del ctx
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grads[0], None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = (sent, received), group
        return _exchanged(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.counts
        return _exchanged(grads[0], received, sent, ctx.group), None, None, None


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


def _exchanged(x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    result = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), received, sent, group=group)
    return result
