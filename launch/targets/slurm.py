"""SLURM: a script for sbatch, and a private Ray cluster on the nodes of the job.

The script starts the controller on the job's first node, in the container if there is one. SLURM signals the script shortly before the
job's time is up, and the script signals the controller.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from manta.cluster.config import ClusterConfig, Slurm
from manta.cluster.machine import address_towards
from manta.cluster.protocol import ExitCode
from manta.cluster.ray.hosts import Host
from manta.cluster.ray.runtime import LOOPBACK, HostsRay
from manta.data.errors import InputError
from manta.data.storage.atomic import write_atomically
from manta.launch.config import RunConfig
from manta.launch.targets.template import fill
from manta.launch.terminal import notify

PIPE = "MANTA_SLURM_NODES"  # the variable with the path of the pipe through which a container's controller has nodes started
# One step with a task per node. All tasks read the same standard input, and one that fails does not end the others.
PER_NODE = ("--ntasks-per-node=1", "--overlap", "--input=all", "--kill-on-bad-exit=0", "--no-kill", "--quit-on-interrupt")


def submit(config: RunConfig) -> int:
    """Submit the script with sbatch, and return the exit code."""
    script, folder = render(config), _folder(config)
    if shutil.which("sbatch") is None:
        raise InputError("--on slurm: expected sbatch on PATH, got none. Use a machine that submits jobs, or add --dry-run.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "run.yaml", config.to_yaml().encode())
    write_atomically(folder / "job.sh", script.encode())
    result = subprocess.run(["sbatch", "--parsable", str(folder / "job.sh")], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        return ExitCode.FAILED
    job = result.stdout.strip().partition(";")[0]
    notify(f"{config.run.dir}: submitted as job {job}; see: manta status {shlex.quote(str(config.run.dir))}, {folder}/job-{job}.log")
    sys.stdout.write(f"{job}\n")
    return ExitCode.DONE


def _folder(config: RunConfig) -> Path:
    """Return the directory of the submitted files."""
    return config.run.dir.absolute() / "slurm"


def render(config: RunConfig) -> str:
    """Return the script. Raises InputError if settings of cluster.slurm contradict each other."""
    slurm, grace = config.cluster.slurm, config.cluster.grace_period
    if slurm.warning <= grace:
        raise InputError(f"cluster.slurm.warning: expected more than cluster.grace_period ({grace:g} s), got {slurm.warning} s. Raise it.")
    if slurm.mounts and slurm.container is None:
        raise InputError("cluster.slurm.mounts: expected none without a container, got some. Set cluster.slurm.container.")
    if slurm.container is not None and slurm.python is None:
        remedy = "Set it, for example to /usr/bin/python3."
        raise InputError(f"cluster.slurm.python: expected the interpreter in cluster.slurm.container, got nothing. {remedy}")
    cluster, name = config.cluster, re.sub(r"[^A-Za-z0-9_.-]+", "-", config.run.dir.absolute().name)
    nodes = f"{cluster.min_nodes}" + (f"-{cluster.max_nodes}" if cluster.max_nodes > cluster.min_nodes else "")
    python, folder = [slurm.python or sys.executable, "-P", "-m"], _folder(config)
    return fill(
        "slurm_job.sh.jinja",
        name=name,
        nodes=nodes,
        slurm=slurm,
        folder=str(folder),
        pipe=PIPE,
        per_node=shlex.join(PER_NODE),
        container=shlex.join(_container(slurm)),
        host=shlex.join([*python, "manta.cluster.ray.host"]),
        controller=shlex.join([*python, "manta.launch", "train", str(folder / "run.yaml"), "--on", "allocation"]),
    )


def ray_of_allocation(cluster: ClusterConfig) -> HostsRay:
    """Return a Ray cluster on the nodes of the job that this process is in. Raises InputError outside of a job."""
    if "SLURM_JOB_ID" not in os.environ:
        raise InputError("--on allocation: expected SLURM_JOB_ID in the environment of a SLURM job, got none. Submit one with --on slurm.")
    slurm = cluster.slurm
    if PIPE in os.environ:  # in the container of the job's script, which starts the nodes
        reach = [sys.executable, "-P", "-m", "manta.cluster.ray.relay", os.environ[PIPE]]
    else:
        nodes = os.environ["SLURM_JOB_NUM_NODES"]
        reach = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", *PER_NODE, *_container(slurm)]
    host = Host(name=f"job {os.environ['SLURM_JOB_ID']}", reach=tuple(reach), python=slurm.python or sys.executable)
    return HostsRay((host,), address=_node_address(), grace=cluster.grace_period)


def _container(slurm: Slurm) -> list[str]:
    """Return srun's options for the container; none without one."""
    mounts = [f"--container-mounts={','.join(slurm.mounts)}"] if slurm.mounts else []
    return [] if slurm.container is None else [f"--container-image={slurm.container}", *mounts]


def _node_address() -> str:
    """Return the address under which the job's other nodes reach this one.

    That is its name's, unless /etc/hosts maps the name to loopback, as Debian's does: then that of the outgoing route.
    """
    named = socket.gethostbyname(socket.gethostname())
    if not named.startswith("127."):
        return named
    try:
        return address_towards("192.0.2.1")  # reserved for documentation: no host has it
    except OSError:
        return LOOPBACK
