"""Detection of silent data corruption: replicas of a weight compare sums of their bits, and ranks that differ are reported.

The check covers the weights that a step has computed with, before its gradients are used. Under ZeRO 1 and 2 weights are gathered again at
the end of each step: a flipped bit exists in one step only, and would corrupt that step's update. Without ZeRO it persists. ZeRO-3's
weights have no replicas, and under no stage have masters and optimizer state that only one rank holds.
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

from manta.trainer.dist.world import Mesh
from manta.trainer.model.transformer import Transformer
from manta.trainer.parallel.sharding import is_sharded

WORD = 8  # bytes that are summed as one number
CHUNK = 1 << 18  # elements copied at a time if they are not aligned to words
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
DELAY = 1.0  # seconds by which the other ranks outlive a reported one: a supervisor takes the first rank to fail for the cause
MAX_NAMED = 4  # ranks reported by name; the others are counted


class ReplicaError(RuntimeError):
    """Replicas of a weight differ: results computed with them are not reliable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """One rank's copy of a weight with differing replicas."""

    name: str
    bits: int  # the sum of its bits
    holders: tuple[int, ...]  # the ranks that hold a replica


class ReplicaCheck:
    def __init__(self, model: Transformer, mesh: Mesh) -> None:
        self._model, self._mesh = model, mesh

    @torch.no_grad()
    def run(self, step: int) -> None:
        """Raise ReplicaError on every rank if replicas differ anywhere. All ranks call this together. step: current or just finished."""
        if self._mesh.layout.replicas == 1:
            return
        mismatches = [*self._compare(self._mesh.replicas, experts=False), *self._compare(self._mesh.expert_replicas, experts=True)]
        count = torch.tensor(len(mismatches), device=next(self._model.parameters()).device)
        dist.all_reduce(count, dist.ReduceOp.MAX)  # so that ranks with other shards learn of it
        if not count.item():
            return
        reports = [(socket.gethostname(), mismatches)] * dist.get_world_size()
        dist.all_gather_object(reports, reports[0])
        ranks, message = diagnose(reports)
        if dist.get_rank() not in ranks:
            time.sleep(DELAY)
        raise ReplicaError(f"step {step}: {message}")

    def _compare(self, group: ProcessGroup, *, experts: bool) -> list[Mismatch]:
        """Return this rank's copies of the weights that differ between replicas in the group; experts, or all other weights."""
        shard = self._mesh.shard
        sums = {name: sum_of_bits(weight) for name, weight in self._weights() if is_sharded(name, shard, "expert") == experts}
        if not sums:
            return []
        sums_P = torch.stack(list(sums.values()))
        extremes_2P = torch.cat((sums_P, ~sums_P))  # the largest complement belongs to the smallest sum
        dist.all_reduce(extremes_2P, dist.ReduceOp.MAX, group=group)
        largest_P, smallest_P = extremes_2P[: len(sums_P)], ~extremes_2P[len(sums_P) :]
        differs = (largest_P != smallest_P).tolist()
        holders = tuple(dist.get_process_group_ranks(group))
        return [Mismatch(name=name, bits=int(sums[name]), holders=holders) for name, other in zip(sums, differs, strict=True) if other]

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        if self._mesh.layout.zero < 3:
            yield from self._model.named_parameters()
        device = next(self._model.parameters()).device
        for name, router in self._model.routers():
            if router.bias is not None:  # not a parameter, so that every rank holds it under every stage
                yield f"{name}.bias", router.bias.to(device)


def sum_of_bits(weight: Tensor) -> Tensor:
    """Return the sum of a weight's bits as 8-byte integers, modulo 2^64. A flipped bit changes it; the order of summation does not.

    It is computed on the weight's device at memory speed, and depends only on the values, not on their address.
    """
    flat = weight.detach().reshape(-1)
    integers, per_word = flat.view(INTEGERS[flat.element_size()]), WORD // flat.element_size()
    end = len(flat) // per_word * per_word
    rest = integers[end:].sum(dtype=torch.int64)
    if flat.storage_offset() % per_word == 0:
        return integers[:end].view(torch.int64).sum() + rest
    chunks = [chunk.clone().view(torch.int64).sum() for chunk in integers[:end].split(CHUNK)]
    return torch.stack(chunks).sum() + rest


def diagnose(reports: Sequence[tuple[str, Sequence[Mismatch]]]) -> tuple[list[int], str]:
    """Return the ranks to blame and a message, from each rank's host and mismatches.

    Of the replicas of a weight, those that differ from the majority are to blame; without a majority, all of them.
    """
    bits = {(rank, mismatch.name): mismatch.bits for rank, (_, mismatches) in enumerate(reports) for mismatch in mismatches}
    blamed: dict[int, list[str]] = {}
    for rank, (_, mismatches) in enumerate(reports):
        for mismatch in mismatches:
            usual, count = Counter(bits[holder, mismatch.name] for holder in mismatch.holders).most_common(1)[0]
            if mismatch.bits != usual or 2 * count <= len(mismatch.holders):
                blamed.setdefault(rank, []).append(mismatch.name)
    first, names = next(iter(blamed.items()))
    holders = next(mismatch.holders for mismatch in reports[first][1] if mismatch.name == names[0])
    sums = {holder: f"{bits[holder, names[0]] % 2**64:016x}" for holder in holders}
    others = [holder for holder in holders if names[0] not in blamed.get(holder, [])]
    ranks = [f"rank {rank} on {reports[rank][0]}" for rank in blamed]
    if len(ranks) > MAX_NAMED:
        ranks = [*ranks[:MAX_NAMED], f"{len(ranks) - MAX_NAMED} more ranks"]
    weights = names[0] + (f" and {len(names) - 1} other weights" if len(names) > 1 else "")
    if others:
        subject = ", ".join(ranks)
        evidence = f"its bits sum to {sums[first]}, but to {sums[others[0]]} on {len(others)} replicas"
    else:
        subject = " or ".join(ranks)
        evidence = f"its bits sum to {', '.join([*sums.values()][:MAX_NAMED])}, without a majority"
    remedy = "Memory or a processor failed: resume from the newest checkpoint, without this machine if it happens again."
    return list(blamed), f"{subject} holds a corrupt {weights}: {evidence}. {remedy}"
