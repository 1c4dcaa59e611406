"""Run a controller: `fake_run_controller.py DIRECTORY COMMAND…`. CLUSTER is its config, FAKE is passed on to the ranks.

OTHER_PYTHON: the interpreter of one of two hosts.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

from manta.cluster.config import ClusterConfig
from manta.cluster.job import Job
from manta.cluster.ray.hosts import Host
from manta.cluster.ray.runtime import LOOPBACK, HostsRay, LocalRay
from manta.cluster.supervise.controller import Controller


def main():
    directory, *command = sys.argv[1:]
    config = ClusterConfig.model_validate_json(os.environ.get("CLUSTER", "{}"))
    job = Job(
        program=tuple(command),
        environment={"FAKE": os.environ.get("FAKE", "{}")},
        directory=Path(directory),
        sizes=tuple(json.loads(os.environ.get("SIZES", "[2]"))),
        ranks_per_node=config.ranks_per_node or 2,
        packages=(("manta", version("manta")),),
    )
    ray = LocalRay(config.max_nodes)
    if other := os.environ.get("OTHER_PYTHON"):
        one, two = (Host(name=address, address=address, gpus=0) for address in ("127.0.0.3", "127.0.0.4"))
        ray = HostsRay((one, two._replace(python=other)), LOOPBACK, 5.0)
    code = 1
    for event in Controller(job, config, ray).run():
        if event.kind == "run-ended":
            code = event.details["exit_code"]
    sys.exit(code)


if __name__ == "__main__":
    main()
