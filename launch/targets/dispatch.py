"""From the name of a target to the run on it."""

import re

from manta.cluster.runtime import JoinedRay, LocalRay
from manta.data.errors import InputError
from manta.launch.config import RunConfig

TARGETS = ("local", "ssh:FILE", "slurm", "kubernetes", "auto", "HOST:PORT of a Ray that this machine is a node of")
HANDED_OVER = {"slurm", "kubernetes"}


def launch(config: RunConfig, on: str, *, dry_run: bool = False, insecure: bool = False) -> int:
    """Starts the run on a target, or hands it over. Gives the exit code. Raises InputError before anything is started."""
    if dry_run and on not in HANDED_OVER:
        raise InputError(
            f"--dry-run: got it with --on {on}, to which nothing is handed over; leave it out, or use --on slurm or kubernetes"
        )
    kind, _, rest = on.partition(":")
    if on == "slurm":
        from manta.launch.targets import slurm

        return slurm.launch(config, dry_run=dry_run)
    if on == "kubernetes":
        from manta.launch.targets import kubernetes

        return kubernetes.launch(config, nodes=config.cluster.most, dry_run=dry_run)
    from manta.launch.train import train

    if on == "local":
        return train(config, LocalRay(config.cluster.most))
    if kind == "ssh" and rest:
        from manta.launch.targets import ssh

        return train(config, ssh.ray_of(rest, config.cluster))
    if on == "allocation":
        from manta.launch.targets import slurm

        return train(config, slurm.ray_of_allocation(config.cluster))
    if on == "auto" or re.fullmatch(r"[\w.-]+:\d+|\[[0-9a-fA-F:]+\]:\d+", on):
        return train(config, JoinedRay(on, insecure=insecure))
    raise InputError(f"--on: got {on!r}, wants one of {', '.join(TARGETS)}")
