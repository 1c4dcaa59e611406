"""The cluster as Ray knows it: what machines there are, which of them are to go, and whether Ray itself is still there.

It is imported when Ray has been started: Ray reads its environment at import.
"""

import socket

import ray
from ray._private import worker
from ray._private.state import state

from manta.cluster.nodes.placement import Machine
from manta.cluster.ray.hosts import ISLAND

PROBE = 0.5  # seconds in which a living machine accepts a connection


def machines() -> list[Machine]:
    """Those that Ray believes in, and that have room for an agent. It may be half a minute late to learn of a loss."""
    return [
        Machine(
            id=found["NodeID"],
            host=found["NodeManagerHostname"],
            address=found["NodeManagerAddress"],
            port=found["NodeManagerPort"],
            cpus=int(found["Resources"]["CPU"]),
            gpus=int(found["Resources"].get("GPU", 0)),
            island=found.get("Labels", {}).get(ISLAND, ""),
        )
        for found in ray.nodes()
        if found["Alive"] and found["Resources"].get("CPU", 0) >= 1
    ]


def draining() -> set[str]:
    """Ids of the nodes that are to be taken away: a spot machine's notice, say. Ray tells nobody who does not ask."""
    return set(state.get_draining_nodes())


def is_headless() -> bool:
    """Whether Ray's head is gone, where it was this process that started it. Whatever asks for it then waits, and Ray ends the process."""
    started = getattr(worker, "_global_node", None)
    heads = started.all_processes.get("gcs_server", ()) if started else ()
    return any(head.process.poll() is not None for head in heads)


def here() -> str:
    """The id of the node that this process is on."""
    return ray.get_runtime_context().get_node_id()


def answers(machine: Machine) -> bool:
    """Whether somebody listens where its raylet did."""
    try:
        socket.create_connection((machine.address, machine.port), timeout=PROBE).close()
    except OSError:
        return False
    return True
