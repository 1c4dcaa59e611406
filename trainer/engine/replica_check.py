"""Have a replica's weights changed under it? Ranks that should hold the same compare sums of their bits; who holds another is named.

Looked at are the weights that a step has computed with, before its gradients are used. Under ZeRO 1 and 2 weights are gathered anew at the
end of each step: there a flipped bit lives in one step alone, and would spoil what that one learns. Without ZeRO it stays. Under ZeRO-3
weights have no replicas; and masters and optimizer state that lie on one rank alone have none under any stage.
"""

import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from manta.trainer.dist import sharding
from manta.trainer.dist.world import Mesh
from manta.trainer.model.transformer import Transformer

WORD = 8  # bytes that are summed as one number
AT_ONCE = 1 << 18  # elements that are copied at a time, where they do not begin at a word's bounds
NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
WAIT = 1.0  # seconds by which the others outlive who is named: a supervisor takes the first to fall for the cause
TOLD = 4  # ranks by name; of more, how many they are


class ReplicaError(RuntimeError):
    """Ranks that should hold the same weights do not: what is computed with them is not to be trusted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a rank holds of a weight that is not the same on all who should hold the same."""

    name: str
    bits: int  # their sum
    holders: tuple[int, ...]  # who should hold the same


class Replicas:
    """All ranks call `look` together."""

    def __init__(self, model: Transformer, mesh: Mesh) -> None:
        self._model, self._mesh = model, mesh

    @torch.no_grad()
    def look(self, step: int) -> None:
        """step: the one under way, or that has just ended. Raises ReplicaError on every rank where weights differ among some."""
        if self._mesh.layout.replicas == 1:
            return
        held = [*self._differing("shared", self._mesh.replicas), *self._differing("expert", self._mesh.expert_replicas)]
        differ = torch.tensor(len(held), device=next(self._model.parameters()).device)
        dist.all_reduce(differ, dist.ReduceOp.MAX)  # ranks that hold other parts learn of it, too
        if not differ.item():
            return
        told = [(socket.gethostname(), held)] * dist.get_world_size()
        dist.all_gather_object(told, told[0])
        named, message = verdict(told)
        if dist.get_rank() not in named:
            time.sleep(WAIT)
        raise ReplicaError(f"step {step}: {message}")

    def _differing(self, kind: str, group: ProcessGroup) -> list[Holding]:
        """Of the weights of this kind, those that are not the same on all ranks of the group. It knows of them on each."""
        sums = {name: sum_of_bits(weight) for name, weight in self._weights() if self._kind(name) == kind}
        if not sums:
            return []
        sums_P = torch.stack(list(sums.values()))
        extremes_2P = torch.cat((sums_P, ~sums_P))  # the largest of what is turned around is the smallest
        dist.all_reduce(extremes_2P, dist.ReduceOp.MAX, group=group)
        largest_P, smallest_P = extremes_2P[: len(sums_P)], ~extremes_2P[len(sums_P) :]
        differs = (largest_P != smallest_P).tolist()
        holders = tuple(dist.get_process_group_ranks(group))
        return [Holding(name=name, bits=int(sums[name]), holders=holders) for name, other in zip(sums, differs, strict=True) if other]

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        if self._mesh.layout.zero < 3:
            yield from self._model.named_parameters()
        device = next(self._model.parameters()).device
        for name, router in self._model.routers():
            if router.bias is not None:  # no parameter, and the same on all under every stage
                yield f"{name}.bias", router.bias.to(device)

    def _kind(self, name: str) -> str:
        return "expert" if sharding.is_cut(name, self._mesh.part, "expert") else "shared"


def sum_of_bits(weight: Tensor) -> Tensor:
    """Of a weight's bits, eight bytes at a time, as whole numbers: modulo 2^64. A flipped bit changes it, an order of summation does not.

    It is made where the weight lies, as fast as that is read, and hangs on nothing but its values: not on where in memory they lie.
    """
    flat = weight.detach().reshape(-1)
    numbers, each = flat.view(NUMBERS[flat.element_size()]), WORD // flat.element_size()
    end = len(flat) // each * each
    rest = numbers[end:].sum(dtype=torch.int64)
    if flat.storage_offset() % each == 0:
        return numbers[:end].view(torch.int64).sum() + rest
    parts = [part.clone().view(torch.int64).sum() for part in numbers[:end].split(AT_ONCE)]
    return torch.stack(parts).sum() + rest


def verdict(told: Sequence[tuple[str, Sequence[Holding]]]) -> tuple[list[int], str]:
    """From each rank's host and what differs there: which ranks are to be named, and in what words.

    Of those that should hold the same weight, those are named that do not hold what most do; all of them, where no more than half agree.
    """
    bits = {(rank, one.name): one.bits for rank, (_, held) in enumerate(told) for one in held}
    odd: dict[int, list[str]] = {}
    for rank, (_, held) in enumerate(told):
        for one in held:
            usual, count = Counter(bits[holder, one.name] for holder in one.holders).most_common(1)[0]
            if one.bits != usual or 2 * count <= len(one.holders):
                odd.setdefault(rank, []).append(one.name)
    first, names = next(iter(odd.items()))
    holders = next(one.holders for one in told[first][1] if one.name == names[0])
    sums = {holder: f"{bits[holder, names[0]] % 2**64:016x}" for holder in holders}
    others = [holder for holder in holders if names[0] not in odd.get(holder, [])]
    named = [f"rank {rank} on {told[rank][0]}" for rank in odd]
    if len(named) > TOLD:
        named = [*named[:TOLD], f"{len(named) - TOLD} more ranks"]
    what = names[0] + (f" and {len(names) - 1} other weights" if len(names) > 1 else "")
    remedy = "memory or a processor failed: go on from the newest checkpoint, without that machine if it comes again"
    if others:
        seen = f"its bits sum to {sums[first]}, and to {sums[others[0]]} on {len(others)} that should hold the same"
        return list(odd), f"{', '.join(named)} holds a changed {what}: {seen}; {remedy}"
    seen = f"its bits sum to {', '.join([*sums.values()][:TOLD])}, and there is no majority"
    return list(odd), f"{' or '.join(named)} holds a changed {what}: {seen}; {remedy}"
