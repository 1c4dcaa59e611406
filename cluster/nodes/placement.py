"""Assign ranks to nodes: whole nodes, neighbours next to each other. Pure functions of the available nodes."""

import ipaddress
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from manta.cluster.machine import Machine


class PlacementError(ValueError):
    """Nodes that the run cannot use as they are; the message says what the user can do."""


class NodeAllocation(NamedTuple):
    machine: Machine
    ranks: int


class Placement(NamedTuple):
    """Ranks are numbered along the nodes."""

    nodes: tuple[NodeAllocation, ...]

    @property
    def ranks(self) -> int:
        return sum(node.ranks for node in self.nodes)


def place_ranks(machines: Collection[Machine], *, max_nodes: int, sizes: Collection[int], ranks_per_node: int | None) -> Placement | None:
    """Return the largest of `sizes` that fits on up to `max_nodes` machines, on as few of them as possible; None if no size fits.

    Raises PlacementError if ranks_per_node is unset and machines have different numbers of GPUs.
    """
    chosen = by_locality(machines)
    if not chosen:
        return None
    if any(machine.gpus for machine in chosen):
        chosen = [machine for machine in chosen if machine.gpus]
    per_node = ranks_per_node or _default_ranks(chosen)
    chosen = [machine for machine in chosen if not machine.gpus or machine.gpus >= per_node][:max_nodes]
    ranks = max((size for size in sizes if size <= per_node * len(chosen)), default=0)
    if not ranks:
        return None
    used = chosen[: -(-ranks // per_node)]
    return Placement(tuple(NodeAllocation(machine, min(per_node, ranks - n * per_node)) for n, machine in enumerate(used)))


def by_locality(machines: Collection[Machine]) -> list[Machine]:
    """Sort by NVLink domain, the largest first; within a domain, and without one, by address."""
    sizes = Counter(machine.nvlink_domain for machine in machines)
    addresses = {machine.address: ipaddress.ip_address(machine.address) for machine in machines}
    by_version = {address: (parsed.version, int(parsed)) for address, parsed in addresses.items()}  # the two versions do not compare
    return sorted(machines, key=lambda m: (-sizes[m.nvlink_domain], m.nvlink_domain, by_version[m.address], m.id))


def _default_ranks(machines: Sequence[Machine]) -> int:
    gpus = sorted({machine.gpus for machine in machines})
    if len(gpus) > 1:
        counts = ", ".join(f"{machine}: {machine.gpus}" for machine in machines[:8])
        expected, remedy = f"a number, since nodes differ in GPUs ({counts})", "or to more to exclude nodes with fewer GPUs"
        raise PlacementError(f"cluster.ranks_per_node: expected {expected}, got nothing. Set it to {gpus[0]}, {remedy}.")
    return gpus[0] or min(2, *(machine.cpus for machine in machines))
