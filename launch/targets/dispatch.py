"""The launch targets. To add one: a function in a module beside this one, and an entry in SUBMIT or CONNECT, and in TARGETS."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from manta.cluster.ray.runtime import JoinedRay, LocalRay, NoClusterError, Ray
from manta.data.errors import InputError
from manta.launch.config import RunConfig
from manta.launch.run.train import train
from manta.launch.targets import kubernetes, ray_job, slurm, ssh

TARGETS = "local, ssh:FILE, slurm, kubernetes, http://HOST:PORT (dashboard of another Ray), auto or HOST:PORT (Ray of this machine)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    on: str
    dry_run: bool
    insecure: bool


# By pattern of --on. These run the whole job elsewhere; the command ends when it is submitted.
SUBMIT: Mapping[str, Callable[[RunConfig, Target], int]] = {
    "slurm": lambda config, target: slurm.submit(config, dry_run=target.dry_run),
    "kubernetes": lambda config, target: kubernetes.submit(config, dry_run=target.dry_run),
    "https?://.*": lambda config, target: ray_job.submit(config, target.on, insecure=target.insecure),
}
# These provide nodes to a run that this process supervises. The first match applies.
CONNECT: Mapping[str, Callable[[RunConfig, Target], Ray]] = {
    "local": lambda config, _: LocalRay(config.cluster.max_nodes),
    "ssh:.+": lambda config, target: ssh.ray_of_hosts(target.on.removeprefix("ssh:"), config.cluster),
    "allocation": lambda config, _: slurm.ray_of_allocation(config.cluster),
    r"auto|[\w.-]+:\d+|\[[0-9a-fA-F:]+\]:\d+": lambda _, target: _join(target),
}
CAN_PRINT = ("slurm", "kubernetes")  # --dry-run
ELSEWHERE = {"slurm": "in an allocation (salloc), with --on allocation", "kubernetes": "in a pod of its Ray, with --on auto"}


def launch(config: RunConfig, on: str, *, dry_run: bool = False, insecure: bool = False, detached: Sequence[str] = ()) -> int:
    """Run on a target, or submit to it, and return the exit code. Raises InputError before anything starts.

    detached: the arguments of a manta that runs in the background instead of this process.
    """
    if dry_run and on not in CAN_PRINT:
        raise InputError(f"--dry-run: expected --on {' or '.join(CAN_PRINT)}, got {on}. Remove --dry-run: there is nothing to print.")
    pattern = _match(SUBMIT, on)
    if pattern is None:
        return train(config, connect(config, on, insecure=insecure), detached=detached)
    if detached:
        raise InputError(f"--detach: expected a target that this process supervises, got {on}. Remove --detach: the run continues anyway.")
    return SUBMIT[pattern](config, Target(on=on, dry_run=dry_run, insecure=insecure))


def connect(config: RunConfig, on: str, *, insecure: bool = False) -> Ray:
    """Return the Ray of a target. Raises InputError if it cannot be joined, or runs only whole jobs."""
    if _match(SUBMIT, on) is not None:
        remedy = f"Run the command {ELSEWHERE.get(on, 'on a node of that Ray, with --on auto')}."
        raise InputError(f"--on: expected a target that this process supervises, got {on}, which runs only whole jobs. {remedy}")
    pattern = _match(CONNECT, on)
    if pattern is None:
        remedy = "Submit the run to the dashboard: --on http://HOST:8265." if on.startswith("ray:") else "Choose one."
        raise InputError(f"--on: expected one of {TARGETS}, got {on!r}. {remedy}")
    return CONNECT[pattern](config, Target(on=on, dry_run=False, insecure=insecure))


def _match(patterns: Iterable[str], on: str) -> str | None:
    return next((pattern for pattern in patterns if re.fullmatch(pattern, on)), None)


def _join(target: Target) -> Ray:
    ray = JoinedRay(target.on, insecure=target.insecure)
    try:
        with ray.connected():
            return ray  # it can be joined: nothing is written before that is known
    except NoClusterError as error:
        raise InputError(f"--on: {error}") from None
