"""The launch targets, by pattern of --on. To add one: a function in a module beside this one, and an entry here."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence

from manta.cluster.protocol import ExitCode
from manta.cluster.ray.runtime import JoinedRay, LocalRay, NoClusterError, Ray
from manta.data.errors import InputError
from manta.launch.config import RunConfig
from manta.launch.run.start import train
from manta.launch.targets import kubernetes, ray_job, slurm, ssh

# They run the whole job elsewhere; the command ends when it is submitted.
SUBMIT: Mapping[str, Callable[[RunConfig, str, bool], int]] = {
    "slurm": lambda config, _on, _insecure: slurm.submit(config),
    "kubernetes": lambda config, _on, _insecure: kubernetes.submit(config),
    "https?://.*": lambda config, on, insecure: ray_job.submit(config, on, insecure=insecure),
}
# What --dry-run prints of them.
RENDER: Mapping[str, Callable[[RunConfig], str]] = {"slurm": slurm.render, "kubernetes": kubernetes.render}
# They provide nodes to a run that this process supervises. The first match applies.
CONNECT: Mapping[str, Callable[[RunConfig, str, bool], Ray]] = {
    "local": lambda config, _on, _insecure: LocalRay(config.cluster.max_nodes),
    "ssh:.+": lambda config, on, _insecure: ssh.ray_of_hosts(on.removeprefix("ssh:"), config.cluster),
    "allocation": lambda config, _on, _insecure: slurm.ray_of_allocation(config.cluster),
    r"auto|[\w.-]+:\d+|\[[0-9a-fA-F:]+\]:\d+": lambda _config, on, insecure: _join(on, insecure=insecure),
}
NAMES = "local, ssh:FILE, slurm, kubernetes, http://HOST:PORT (dashboard of another Ray), auto or HOST:PORT (Ray of this machine)"
ELSEWHERE = {"slurm": "in an allocation (salloc), with --on allocation", "kubernetes": "in a pod of its Ray, with --on auto"}


def launch(config: RunConfig, on: str, *, dry_run: bool = False, insecure: bool = False, detached: Sequence[str] = ()) -> int:
    """Run on a target, or submit to it, and return the exit code. Raises InputError before anything starts.

    detached: arguments for a background manta process that runs instead of this one.
    """
    if dry_run:
        if on not in RENDER:
            raise InputError(f"--dry-run: expected --on {' or '.join(RENDER)}, got {on}. Remove --dry-run: there is nothing to print.")
        sys.stdout.write(RENDER[on](config))
        return ExitCode.DONE
    for pattern, submit in SUBMIT.items():
        if re.fullmatch(pattern, on):
            if detached:
                raise InputError(f"--detach: expected a run of this process, got --on {on}. Remove --detach: the run continues anyway.")
            return submit(config, on, insecure)
    return train(config, connect(config, on, insecure=insecure), detached=detached)


def connect(config: RunConfig, on: str, *, insecure: bool = False) -> Ray:
    """Return the Ray of a target. Raises InputError if it cannot be joined, or runs only whole jobs."""
    for pattern, ray_of in CONNECT.items():
        if re.fullmatch(pattern, on):
            return ray_of(config, on, insecure)
    if any(re.fullmatch(pattern, on) for pattern in SUBMIT):
        where = ELSEWHERE.get(on, "on a node of that Ray, with --on auto")
        raise InputError(f"--on: expected a target for any command, got {on}, which runs only whole jobs. Run the command {where}.")
    remedy = "Submit the run to the dashboard: --on http://HOST:8265." if on.startswith("ray:") else "Choose one."
    raise InputError(f"--on: expected one of {NAMES}, got {on!r}. {remedy}")


def _join(on: str, *, insecure: bool) -> Ray:
    ray = JoinedRay(on, insecure=insecure)
    try:
        with ray.connected():
            return ray  # it can be joined: nothing is written before that is known
    except NoClusterError as error:
        raise InputError(f"--on: {error}") from None
