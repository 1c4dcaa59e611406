"""Differentiable collectives of parallel layers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def copy_to_group(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return x. Its gradient is summed over the group, since each rank uses x in another way."""
    return _Sum.apply(x, group, False, True)  # type: ignore[no-any-return]


def reduce_from_group(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of x over the group. Every rank continues with the same values, so the gradient passes unchanged."""
    return _Sum.apply(x, group, True, False)  # type: ignore[no-any-return]


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of x over the group. Each rank computes a share of the loss, so the gradient is summed as well."""
    return _Sum.apply(x, group, True, True)  # type: ignore[no-any-return]


def all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
    """Send rows of x [sum(sent), …] to the group's ranks, sent[r] of them to rank r. Return the received rows [sum(received), …]."""
    return _AllToAll.apply(x, list(sent), list(received), group)  # type: ignore[no-any-return]


class _Sum(torch.autograd.Function):
    """The sum over the group: of x in the forward pass, of its gradient in the backward pass, or both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, forward: bool, backward: bool) -> Tensor:
        ctx.group, ctx.backward_sum = group, backward
        return _sum(x, group) if forward else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum(grads[0], ctx.group) if ctx.backward_sum else grads[0], None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = (sent, received), group
        return _exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.counts
        return _exchange(grads[0], received, sent, ctx.group), None, None, None


def _sum(x: Tensor, group: ProcessGroup) -> Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


def _exchange(x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    result = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), received, sent, group=group)
    return result
