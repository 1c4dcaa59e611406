"""From the name of a target to the run on it."""

from manta.data.errors import InputError
from manta.launch.config import RunConfig

TARGETS = ("local", "kubernetes")


def launch(config: RunConfig, on: str, *, dry_run: bool) -> int:
    """Starts the run on a target, or hands it over. Gives the exit code. Raises InputError before anything is started."""
    if dry_run and on == "local":
        raise InputError("--dry-run: got it for this machine, to which nothing is handed over; leave it out, or add --on kubernetes")
    if on == "local":
        from manta.launch.train import train

        return train(config)
    if on == "kubernetes":
        from manta.launch.targets import kubernetes

        return kubernetes.launch(config, nodes=config.cluster.nodes, dry_run=dry_run)
    raise InputError(f"--on: got {on!r}, wants one of {', '.join(TARGETS)}")
