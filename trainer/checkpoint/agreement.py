"""Decisions that ranks make as one: the first rank decides, or all have to succeed. A process without ranks is the first of one."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
Group = Any  # a process group with a gloo backend, or None for that of all ranks


def rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_first_rank(function: Callable[[], T], group: Group = None) -> T:
    """Return on all ranks what the function returns on the first, or raise the error that it raises there."""
    rank, size = rank_and_size()
    outcome: list[Any] = [None, None]  # result, error
    if rank == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # noqa: BLE001  raised below
            outcome[1] = error
    if size > 1:
        dist.broadcast_object_list(outcome, src=0, group=group, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather_to_first(value: T, group: Group = None) -> list[T]:
    """Return the values of all ranks on the first, and an empty list on the others."""
    rank, size = rank_and_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.gather_object(value, values if rank == 0 else None, dst=0, group=group)
    return values if rank == 0 else []


def scatter_from_first(values: Sequence[T], group: Group = None) -> T:
    """Return this rank's value of those that the first rank has, one for each rank."""
    rank, size = rank_and_size()
    if size == 1:
        return values[0]
    received: list[Any] = [None]
    dist.scatter_object_list(received, list(values) if rank == 0 else None, src=0, group=group)
    return received[0]


def all_or_raise(function: Callable[[], None], error: type[Exception]) -> None:
    """Run the function on all ranks. If it raises `error` or a subclass on some, raise the first of these on all."""
    failure: Exception | None = None
    try:
        function()
    except error as raised:
        failure = type(raised)(str(raised))
    _, size = rank_and_size()
    failures: list[Exception | None] = [failure] * size
    if size > 1:
        dist.all_gather_object(failures, failure)
    if (first := next((one for one in failures if one is not None), None)) is not None:
        raise first
