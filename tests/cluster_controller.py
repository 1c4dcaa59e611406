"""A controller in a process of its own: `cluster_controller.py DIRECTORY COMMAND…`; CLUSTER is its config, FAKE goes to the ranks."""

import os
import sys
from pathlib import Path

from manta.cluster.config import ClusterConfig
from manta.cluster.controller import Controller
from manta.cluster.job import Job


def main():
    directory, *command = sys.argv[1:]
    job = Job(
        command=tuple(command),
        environment={"FAKE": os.environ.get("FAKE", "{}")},
        directory=Path(directory),
        ranks=2,
        ranks_per_node=2,
    )
    code = 1
    for event in Controller(job, ClusterConfig.model_validate_json(os.environ.get("CLUSTER", "{}"))).run():
        if event.kind == "run-ended":
            code = event.details["exit_code"]
    sys.exit(code)


if __name__ == "__main__":
    main()
