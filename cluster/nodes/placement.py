"""Which ranks lie on which nodes: whole nodes, neighbours next to each other. Pure functions of what nodes there are."""

import ipaddress
from collections.abc import Collection, Sequence
from dataclasses import dataclass


class PlacementError(ValueError):
    """Nodes that can not be used as they are; its text says what a person can do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A node as Ray knows it. Its `id` is never used again, not even by the same machine when it comes back."""

    id: str
    host: str
    address: str
    port: int  # of its raylet
    cpus: int
    gpus: int = 0
    island: str = ""  # machines of one share an NVLink fabric

    def __str__(self) -> str:
        return f"{self.host} ({self.address})"


@dataclass(frozen=True, slots=True)
class Place:
    machine: Machine
    ranks: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Ranks are numbered along the places."""

    places: tuple[Place, ...]

    @property
    def ranks(self) -> int:
        return sum(place.ranks for place in self.places)

    def __str__(self) -> str:
        nodes = "1 node" if len(self.places) == 1 else f"{len(self.places)} nodes"
        return f"{self.ranks} ranks on {nodes}" if self.ranks > 1 else f"1 rank on {nodes}"


def place(machines: Collection[Machine], *, most: int, sizes: Collection[int], ranks_per_node: int | None) -> Placement | None:
    """The largest of `sizes` that up to `most` machines hold, on as few of them as can be; None where they hold not even the smallest.

    Raises PlacementError where machines have different numbers of GPUs, and nobody has said how many ranks each shall have.
    """
    chosen = in_order(machines)
    if not chosen:
        return None
    if any(machine.gpus for machine in chosen):
        chosen = [machine for machine in chosen if machine.gpus]
    each = ranks_per_node or _gpus(chosen)
    chosen = [machine for machine in chosen if not machine.gpus or machine.gpus >= each][:most]
    ranks = max((size for size in sizes if size <= each * len(chosen)), default=0)
    if not ranks:
        return None
    return Placement(tuple(Place(machine, min(each, ranks - at * each)) for at, machine in enumerate(chosen) if at * each < ranks))


def in_order(machines: Collection[Machine]) -> list[Machine]:
    """Those of an NVLink island together, the largest island first; within one, and where there are none, by address."""
    of = {island: sum(machine.island == island for machine in machines) for island in {machine.island for machine in machines}}
    return sorted(machines, key=lambda machine: (-of[machine.island], machine.island, _number(machine.address), machine.id))


def _gpus(machines: Sequence[Machine]) -> int:
    having = sorted({machine.gpus for machine in machines})
    if len(having) > 1:
        each = ", ".join(f"{machine}: {machine.gpus}" for machine in machines[:8])
        raise PlacementError(
            f"cluster.ranks_per_node: got nothing, and nodes differ in GPUs ({each}); wants the ranks of each node: set it to"
            f" {having[0]}, or to more, and nodes with fewer GPUs are left out"
        )
    return having[0] or min(2, *(machine.cpus for machine in machines))


def _number(address: str) -> tuple[int, int]:
    parsed = ipaddress.ip_address(address)
    return parsed.version, int(parsed)
