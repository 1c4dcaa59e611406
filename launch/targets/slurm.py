"""SLURM: a script for sbatch, and a private Ray cluster on the nodes of the job.

The script starts the controller on the job's first node. SLURM signals the script shortly before the job's time is up, and the script
signals the controller.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from manta.cluster.config import ClusterConfig
from manta.cluster.machine import address_towards
from manta.cluster.protocol import ExitCode
from manta.cluster.ray.hosts import Host
from manta.cluster.ray.runtime import LOOPBACK, HostsRay
from manta.data.errors import InputError
from manta.data.storage.atomic import write_atomically
from manta.launch.config import RunConfig
from manta.launch.targets.template import fill
from manta.launch.terminal import notify


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
    cluster, name = config.cluster, re.sub(r"[^A-Za-z0-9_.-]+", "-", config.run.dir.absolute().name)
    nodes = f"{cluster.min_nodes}" + (f"-{cluster.max_nodes}" if cluster.max_nodes > cluster.min_nodes else "")
    python = slurm.python or sys.executable
    return fill("slurm_job.sh.jinja", name=name, nodes=nodes, slurm=slurm, folder=_folder(config), python=python)


def ray_of_allocation(cluster: ClusterConfig) -> HostsRay:
    """Return a Ray cluster on the nodes of the job that this process is in. Raises InputError outside of a job."""
    if "SLURM_JOB_ID" not in os.environ:
        raise InputError("--on allocation: expected SLURM_JOB_ID in the environment of a SLURM job, got none. Submit one with --on slurm.")
    nodes, slurm = os.environ["SLURM_JOB_NUM_NODES"], cluster.slurm
    # One step with a task per node. All tasks read the same standard input, and one that fails does not end the others.
    options = "--ntasks-per-node=1 --overlap --input=all --kill-on-bad-exit=0 --no-kill --quit-on-interrupt"
    reach = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", *options.split()]
    if slurm.container is not None:
        reach += [f"--container-image={slurm.container}", *([f"--container-mounts={','.join(slurm.mounts)}"] if slurm.mounts else [])]
    host = Host(name=f"job {os.environ['SLURM_JOB_ID']}", reach=tuple(reach), python=slurm.python or sys.executable)
    return HostsRay((host,), address=_node_address(), grace=cluster.grace_period)


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
