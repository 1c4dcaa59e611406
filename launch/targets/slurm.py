"""A run as a job of SLURM's: a script for sbatch, and, in the job that comes of it, a Ray of the run's own on its nodes.

The script starts the controller on the job's first node. SLURM tells the script, and it the controller, when the job's time is nearly up.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from manta.cluster.config import ClusterConfig
from manta.cluster.nodes.machine import address_towards
from manta.cluster.protocol import ExitCode
from manta.cluster.ray.hosts import Host
from manta.cluster.ray.runtime import LOOPBACK, HostsRay
from manta.data.errors import InputError
from manta.data.storage.atomic import write_atomically
from manta.launch.config import RunConfig
from manta.launch.run.display import say

FOLDER = "slurm"  # of the run directory: what was handed over


def launch(config: RunConfig, *, dry_run: bool) -> int:
    """Hands the script to sbatch, or prints it. Gives the exit code. Raises InputError where the job could not run."""
    check(config)
    folder = config.run.dir.absolute() / FOLDER
    script = render(config, folder / "run.yaml")
    if dry_run:
        sys.stdout.write(script)
        return 0
    if shutil.which("sbatch") is None:
        raise InputError("--on slurm: got no sbatch on PATH, wants a machine that submits jobs; or add --dry-run")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "run.yaml", config.to_yaml().encode())
    write_atomically(folder / "job.sh", script.encode())
    done = subprocess.run(["sbatch", "--parsable", str(folder / "job.sh")], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return ExitCode.FAILED
    job = done.stdout.strip().partition(";")[0]
    say(f"{config.run.dir}: submitted as job {job}; see: manta status {shlex.quote(str(config.run.dir))}, {folder}/job-{job}.log")
    sys.stdout.write(f"{job}\n")
    return 0


def check(config: RunConfig) -> None:
    """Raises InputError where what is asked of SLURM can not be kept."""
    slurm = config.cluster.slurm
    if slurm.warning <= config.cluster.grace_period:
        wants = f"more than cluster.grace_period {config.cluster.grace_period:g} s"
        raise InputError(f"cluster.slurm.warning: got {slurm.warning} s, wants {wants}; lower cluster.grace_period, or raise it")
    if slurm.mounts and slurm.container is None:
        raise InputError("cluster.slurm.mounts: got some, and no container to mount them in; name cluster.slurm.container")


def render(config: RunConfig, file: Path) -> str:
    """The script. `file`: where the job finds the run's config."""
    slurm = config.cluster.slurm
    python = shlex.quote(slurm.python or sys.executable)
    modules = "".join(f"module load {shlex.quote(module)}\n" for module in slurm.modules)
    directives = "".join(f"#SBATCH {line}\n" for line in _directives(config, file.parent))
    again = 'scontrol requeue "$SLURM_JOB_ID"' if slurm.requeue else "echo 'its time is up; go on with the same command'"
    return f"""#!/bin/bash
{directives}
set -u
{modules}
# The controller, on the first node. It reaches the others by srun.
{python} -P -m manta.launch train {shlex.quote(str(file))} --on allocation &
run=$!

# SLURM tells this script alone. Only where the time is up does the job queue again: not where somebody cancels it.
time_is_up=no
trap 'time_is_up=yes; kill -USR1 "$run"' USR1
trap 'kill -TERM "$run"' TERM
wait "$run"
code=$?
while kill -0 "$run" 2>/dev/null; do
    wait "$run"
    code=$?
done

if [ "$code" = {ExitCode.SAVED} ] && [ "$time_is_up" = yes ]; then
    {again}
fi
exit "$code"
"""


def _directives(config: RunConfig, folder: Path) -> Iterator[str]:
    cluster, slurm = config.cluster, config.cluster.slurm
    yield f"--job-name={re.sub(r'[^A-Za-z0-9_.-]+', '-', config.run.dir.absolute().name)}"
    yield f"--nodes={cluster.min_nodes}" + (f"-{cluster.max_nodes}" if cluster.max_nodes > cluster.min_nodes else "")
    yield "--ntasks-per-node=1"
    if slurm.exclusive:
        yield "--exclusive"
    if slurm.gpus_per_node is not None:
        yield f"--gpus-per-node={slurm.gpus_per_node}"
    asked = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "time": slurm.time, "constraint": slurm.constraint}
    yield from (f"--{option}={value}" for option, value in asked.items() if value is not None)
    yield f"--signal=B:USR1@{slurm.warning}"
    yield "--requeue" if slurm.requeue else "--no-requeue"
    yield f'--output="{folder / "job-%j.log"}"'
    yield "--open-mode=append"
    yield from slurm.options


def ray_of_allocation(cluster: ClusterConfig) -> HostsRay:
    """The Ray of the nodes of the job that this process is in. Raises InputError outside of one."""
    if "SLURM_JOB_ID" not in os.environ:
        raise InputError("--on allocation: got no SLURM_JOB_ID, wants to be run in a job of SLURM's; submit one with: --on slurm")
    nodes, slurm = os.environ["SLURM_JOB_NUM_NODES"], cluster.slurm
    # One step with a task a node. What it is told on standard input all of them hear; one that fails does not end the others.
    reach = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap"]
    reach += ["--input=all", "--kill-on-bad-exit=0", "--no-kill", "--quit-on-interrupt"]
    if slurm.container is not None:
        reach += [f"--container-image={slurm.container}", *([f"--container-mounts={','.join(slurm.mounts)}"] if slurm.mounts else [])]
    host = Host(name=f"job {os.environ['SLURM_JOB_ID']}", reach=tuple(reach), python=slurm.python or sys.executable)
    return HostsRay((host,), address=_own_address(), grace=cluster.grace_period)


def _own_address() -> str:
    """This node's, as those of the job reach it: its name's. Where that is one of the loopback's, as Debian's /etc/hosts has it, the one
    on the way out.
    """
    named = socket.gethostbyname(socket.gethostname())
    if not named.startswith("127."):
        return named
    try:
        return address_towards("192.0.2.1")  # nobody's
    except OSError:
        return LOOPBACK
