"""What ranks do as one: the first decides, or all have to succeed. A process that is no rank is the first of one."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
Group = Any  # a process group that gloo serves, or None for that of all ranks


def rank_of_ranks() -> tuple[int, int]:
    """This rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first_says(say: Callable[[], T], group: Group = None) -> T:
    """What `say` gives on the first rank, on all; or the error that it raises there."""
    rank, ranks = rank_of_ranks()
    said: list[Any] = [None, None]
    if rank == 0:
        try:
            said[0] = say()
        except Exception as error:  # noqa: BLE001  raised below
            said[1] = error
    if ranks > 1:
        dist.broadcast_object_list(said, src=0, group=group, device=torch.device("cpu"))
    if said[1] is not None:
        raise said[1]
    return said[0]


def first_hears(told: T, group: Group = None) -> list[T]:
    """What each rank tells, on the first; nothing on the others."""
    rank, ranks = rank_of_ranks()
    if ranks == 1:
        return [told]
    heard: list[Any] = [None] * ranks
    dist.gather_object(told, heard if rank == 0 else None, dst=0, group=group)
    return heard if rank == 0 else []


def first_deals(dealt: Sequence[T], group: Group = None) -> T:
    """To each rank its own of what the first has for each."""
    rank, ranks = rank_of_ranks()
    if ranks == 1:
        return dealt[0]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, list(dealt) if rank == 0 else None, src=0, group=group)
    return mine[0]


def all_or_none(do: Callable[[], None], error: type[Exception]) -> None:
    """Raises on all ranks what the first of them raised, where some rank raised `error`, or one of its kind."""
    failed: Exception | None = None
    try:
        do()
    except error as raised:
        failed = type(raised)(str(raised))
    _, ranks = rank_of_ranks()
    told: list[Exception | None] = [failed] * ranks
    if ranks > 1:
        dist.all_gather_object(told, failed)
    if (first := next((one for one in told if one is not None), None)) is not None:
        raise first
