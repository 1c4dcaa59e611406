"""What ranks take from the environment in which a run or its nodes were started: all of it, except what these two lists name."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from manta.cluster.protocol import Env

REMOVED = {
    **dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), "the run sets its own"),
    **dict.fromkeys(Env, "the run sets its own: these may be of a run that started this one"),
    "TORCHELASTIC_*": "torchrun's: ranks would wait for the store of its agent, or report to it",
    "GROUP_RANK": "torchrun's: it numbers nodes, of another job",
    "GROUP_WORLD_SIZE": "torchrun's",
    "ROLE_*": "torchrun's",
    "PET_*": "torchrun's options, as Kubeflow sets them",
    "OMPI_*": "Open MPI's: libraries would take ranks for processes of mpirun",
    "PMI_*": "as OMPI_*, of MPICH and SLURM",
    "PMIX_*": "as OMPI_*, of Open MPI and SLURM",
    "SLURM_PROCID": "SLURM's: it numbers the task that started the node's processes, so it is the same for all of the node's ranks",
    "SLURM_LOCALID": "as SLURM_PROCID",
    "SLURM_TASK_PID": "as SLURM_PROCID",
    "NCCL_COMM_ID": "the address of another job's communicator: NCCL would join that one",
    "RAY_*": "Ray's: ranks do not use it, and must not see where its token is",
    "PYTHONPATH": "Ray sets it for its workers; see TAKEN_ALONG",
    "PYTHONBREAKPOINT": "Ray sets it for its workers",
    "OMP_NUM_THREADS": "Ray sets it for its workers; see TAKEN_ALONG",
    "SPT_NOENV": "Ray sets it for its workers",
}
"""Patterns of names that ranks do not inherit, and why."""

TAKEN_ALONG = {
    "PYTHONPATH": "the user's modules",
    "OMP_NUM_THREADS": "otherwise a node's cores are divided by its ranks",
    "GLOO_SOCKET_IFNAME": "otherwise the interface of the node's address",
    "NCCL_SOCKET_IFNAME": "otherwise the interface of the node's address",
}
"""Names that ranks on every node take from the environment of the controller, and why."""


COUNTED = {
    **dict.fromkeys(
        ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
        "it decides how many ranks a node has: export it there",
    ),
}
"""Names that must be set before a node's ranks are counted, and why."""


def set_by_the_run(name: str) -> str | None:
    """Return why a variable cannot be set for the ranks; None if it can."""
    removed = (why for pattern, why in REMOVED.items() if fnmatchcase(name, pattern) and name not in TAKEN_ALONG)
    return COUNTED.get(name) or next(removed, None)


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a node that its ranks inherit."""
    return {name: value for name, value in environment.items() if not any(fnmatchcase(name, pattern) for pattern in REMOVED)}


def taken_along(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the controller that all ranks get."""
    return {name: environment[name] for name in TAKEN_ALONG if name in environment}
