"""The launch targets, by the value of --on. To add one: a function in a module beside this one, and a case in `launch` or `connect`."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from manta.cluster.protocol import ExitCode
from manta.cluster.ray.connection import Connection
from manta.cluster.ray.errors import RayStartError
from manta.cluster.ray.runtime import HostsRay, JoinedRay, LocalRay, Ray
from manta.data.errors import InputError
from manta.data.messages import MessageConsole
from manta.launch.config import RunConfig
from manta.launch.report.at_end import write_at_end  # not when a run ends: it may have been upgraded by then
from manta.launch.run.dry_run import describe
from manta.launch.run.preflight import local_ranks
from manta.launch.run.start import train
from manta.launch.targets import kubernetes, ray_job, slurm, ssh
from manta.launch.terminal import notify

BATCH = {"slurm": slurm, "kubernetes": kubernetes}  # they run the whole job elsewhere; the command ends when it is submitted
DASHBOARD = ("http://", "https://")  # of a Ray that does so, too
INTERVAL = 5.0  # seconds between messages that it waits
RAY_ADDRESS = r"auto|[\w.-]+:\d+|\[[0-9a-fA-F:]+\]:\d+"
NAMES = "local, ssh:FILE, slurm, kubernetes, http://HOST:PORT (dashboard of another Ray), auto or HOST:PORT (Ray of this machine)"
ELSEWHERE = {"slurm": "in an allocation (salloc), with --on allocation", "kubernetes": "in a pod of its Ray, with --on auto"}


def launch(config: RunConfig, on: str, *, dry_run: bool = False, insecure: bool = False, detached: Sequence[str] = ()) -> int:
    """Run on a target, or submit to it, and return the exit code. Raises InputError before anything starts.

    detached: arguments for a background manta process that runs instead of this one.
    """
    if dry_run:
        return _dry_run(config, on, insecure=insecure)
    if detached and (on in BATCH or on.startswith(DASHBOARD)):
        raise InputError(f"--detach: expected a run of this process, got --on {on}. Remove --detach: the run continues anyway.")
    if on in BATCH:
        return BATCH[on].submit(config)
    if on.startswith(DASHBOARD):
        return ray_job.submit(config, on, insecure=insecure)
    return train(config, connect(config, on, insecure=insecure), write_report=write_at_end, detached=detached)


def _dry_run(config: RunConfig, on: str, *, insecure: bool) -> int:
    """Print what would run. If that is a script or manifest, only it goes to standard output, so that it can be submitted."""
    cluster = config.cluster
    show = notify if on in BATCH else MessageConsole(sys.stdout).message
    if on == "local":
        ranks_per_node, started = local_ranks(config), ["Ray on this machine"]
    elif on == "slurm":
        ranks_per_node, started = cluster.ranks_per_node or cluster.slurm.gpus_per_node, ["sbatch, with this script:"]
    elif on == "kubernetes":
        ranks_per_node, started = cluster.ranks_per_node or cluster.kubernetes.gpus, ["kubectl apply, with this manifest:"]
    elif on.startswith(DASHBOARD):
        command = ray_job.entrypoint(ray_job.train_command(config, insecure=insecure))
        ranks_per_node, started = cluster.ranks_per_node, [f"a job of {ray_job.host_of('--on', on)}: {command}"]
    elif re.fullmatch(RAY_ADDRESS, on):
        ranks_per_node, started = cluster.ranks_per_node, [f"nothing but ranks: it joins the Ray at {on}"]
    else:
        ray = connect(config, on)
        assert isinstance(ray, HostsRay)
        commands = [f"on {host.name}: {shlex.join(host.command('-P', '-m', 'manta.cluster.ray.host'))}" for host in ray.hosts]
        ranks_per_node, started = cluster.ranks_per_node, commands
    script = BATCH[on].render(config) if on in BATCH else ""
    described = list(describe(config, ranks_per_node or None, sees_files=on not in BATCH and not on.startswith(DASHBOARD)))
    rank = f"each rank: python -P -m manta.trainer {shlex.quote(str(config.run.dir.absolute()))}"
    for line in (*described, rank, *(f"would start {each}" for each in started)):
        show(line)
    sys.stdout.write(script)
    return ExitCode.DONE


def connect(config: RunConfig, on: str, *, insecure: bool = False) -> Ray:
    """Return the Ray of a target. Raises InputError if it cannot be joined, or runs only whole jobs."""
    if on == "local":
        return LocalRay(config.cluster.max_nodes)
    if on == "allocation":
        return slurm.ray_of_allocation(config.cluster)
    if on.startswith("ssh:") and on != "ssh:":
        return ssh.ray_of_hosts(str(Path(on.removeprefix("ssh:")).expanduser()), config.cluster)
    if re.fullmatch(RAY_ADDRESS, on):
        ray = JoinedRay(on, insecure=insecure)
        try:
            with Connection(ray) as connection:  # nothing is written before it is known that it can be joined
                while not connection.is_ready(INTERVAL):
                    notify(f"waiting for Ray at {on}")
        except RayStartError as error:
            raise InputError(f"--on: {error}") from None
        return ray
    if on in BATCH or on.startswith(DASHBOARD):
        where = ELSEWHERE.get(on, "on a node of that Ray, with --on auto")
        raise InputError(f"--on: expected a target for any command, got {on}, which runs only whole jobs. Run the command {where}.")
    remedy = "Submit the run to the dashboard: --on http://HOST:8265." if on.startswith("ray:") else "Choose one."
    raise InputError(f"--on: expected one of {NAMES}, got {on!r}. {remedy}")
