"""The cluster as Ray lists it: its machines, those that drain, and whether Ray's head is still alive.

Import it after Ray has started: Ray reads its environment when it is imported.
"""

import socket

import ray
from ray._private import worker
from ray._private.state import state

from manta.cluster.machine import Machine
from manta.cluster.ray.hosts import NVLINK_DOMAIN_LABEL

CONNECT_TIMEOUT = 0.5  # seconds in which a living machine accepts a connection


def machines() -> list[Machine]:
    """Return the machines that Ray lists as alive and that can hold an agent. Ray may notice a loss half a minute late."""
    return [
        Machine(
            id=node["NodeID"],
            host=node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            port=node["NodeManagerPort"],
            cpus=int(node["Resources"]["CPU"]),
            gpus=int(node["Resources"].get("GPU", 0)),
            nvlink_domain=node.get("Labels", {}).get(NVLINK_DOMAIN_LABEL, ""),
        )
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    ]


def draining() -> set[str]:
    """Return the ids of nodes that Ray drains: of a spot machine about to be reclaimed, for example. Ray does not announce them."""
    return set(state.get_draining_nodes())


def is_head_lost() -> bool:
    """Whether the head that this process started is gone. A call that needs the head then blocks, and Ray ends the process."""
    started = getattr(worker, "_global_node", None)
    heads = started.all_processes.get("gcs_server", ()) if started else ()
    return any(head.process.poll() is not None for head in heads)


def is_reachable(machine: Machine) -> bool:
    """Whether anything listens on its raylet's port."""
    try:
        socket.create_connection((machine.address, machine.port), timeout=CONNECT_TIMEOUT).close()
    except OSError:
        return False
    return True
