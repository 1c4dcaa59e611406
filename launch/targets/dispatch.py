"""From the name of a target to the run on it."""

import re
from collections.abc import Sequence

from manta.cluster.ray.runtime import JoinedRay, LocalRay, NoClusterError, Ray
from manta.data.errors import InputError
from manta.launch.config import RunConfig

TARGETS = ("local", "ssh:FILE", "slurm", "kubernetes", "http://HOST:PORT of a Ray's dashboard", "auto", "HOST:PORT of the Ray it is on")
RENDERED = {"slurm", "kubernetes"}


def launch(config: RunConfig, on: str, *, dry_run: bool = False, insecure: bool = False, detached: Sequence[str] = ()) -> int:
    """Starts the run on a target, or hands it over. Gives the exit code. Raises InputError before anything is started.

    `detached`: the arguments of the manta that does so in the background, where this one is not to.
    """
    if dry_run and on not in RENDERED:
        raise InputError(f"--dry-run: got it with --on {on}, for which nothing is rendered; leave it out, or use --on slurm or kubernetes")
    if detached and is_handed_over(on):
        raise InputError(f"--detach: got it with --on {on}, which keeps the run anyhow; leave it out")
    if on == "slurm":
        from manta.launch.targets import slurm

        return slurm.launch(config, dry_run=dry_run)
    if on == "kubernetes":
        from manta.launch.targets import kubernetes

        return kubernetes.launch(config, nodes=config.cluster.max_nodes, dry_run=dry_run)
    if is_handed_over(on):
        from manta.launch.targets import ray_job

        return ray_job.submit(config, on, insecure=insecure)
    from manta.launch.run.train import train

    return train(config, ray_of(config, on, insecure=insecure), detached=detached)


def is_handed_over(on: str) -> bool:
    """Whether somebody else runs it there, and this command ends at once."""
    return on in RENDERED or on.startswith(("http://", "https://"))


def ray_of(config: RunConfig, on: str, *, insecure: bool = False) -> Ray:
    """The Ray of a target that is run from here. Raises InputError where it is none, or can not be joined."""
    if is_handed_over(on):
        there = {"slurm": "in an allocation (salloc), with --on allocation", "kubernetes": "in a pod of its Ray, with --on auto"}
        where = there.get(on, "on a node of that Ray, with --on auto")
        raise InputError(f"--on: got {on}, to which only a whole run is handed over; give the command {where}")
    kind, _, rest = on.partition(":")
    if on == "local":
        return LocalRay(config.cluster.max_nodes)
    if kind == "ssh" and rest:
        from manta.launch.targets import ssh

        return ssh.ray_of(rest, config.cluster)
    if on == "allocation":
        from manta.launch.targets import slurm

        return slurm.ray_of_allocation(config.cluster)
    if on == "auto" or re.fullmatch(r"[\w.-]+:\d+|\[[0-9a-fA-F:]+\]:\d+", on):
        ray = JoinedRay(on, insecure=insecure)
        try:
            with ray.connected():
                pass  # before anything is written
        except NoClusterError as error:
            raise InputError(f"--on: {error}") from None
        return ray
    if kind == "ray":
        raise InputError(f"--on: got {on}, by which a run would end with this terminal; submit it: --on http://HOST:8265, the dashboard's")
    raise InputError(f"--on: got {on!r}, wants one of {', '.join(TARGETS)}")
