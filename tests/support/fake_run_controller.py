"""Run a controller: `fake_run_controller.py DIRECTORY COMMAND…`. CLUSTER is its config, FAKE is passed on to the ranks."""

import json
import os
import sys
from pathlib import Path

from manta.cluster.config import ClusterConfig
from manta.cluster.job import Job
from manta.cluster.ray.runtime import LocalRay
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
    )
    code = 1
    for event in Controller(job, config, LocalRay(config.max_nodes)).run():
        if event.kind == "run-ended":
            code = event.details["exit_code"]
    sys.exit(code)


if __name__ == "__main__":
    main()
