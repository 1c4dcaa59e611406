"""Kubernetes: a RayJob of KubeRay, with a head pod that supervises the run, and a pod for each node that trains.

The manifest is a pure function of the config. It contains no secrets, only their names.
"""

import hashlib
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from os.path import normpath

from manta.cluster.config import CONFIG_MOUNT
from manta.cluster.protocol import ExitCode
from manta.cluster.ray.hosts import OBJECT_STORE_BYTES
from manta.cluster.ray.private_ray import HEALTH
from manta.data.errors import InputError
from manta.launch.config import RunConfig
from manta.launch.targets.paths import location_problems
from manta.launch.targets.template import fill
from manta.trainer.dist.layout import largest_layout

SLACK = 15  # seconds beyond cluster.grace_period, for the controller's last messages


def submit(config: RunConfig) -> int:
    """Apply the manifest with kubectl, and return the exit code."""
    manifest, kubectl = render(config), shutil.which("kubectl")
    if kubectl is None:
        raise InputError("--on kubernetes: expected kubectl on PATH, got none. Install it, or add --dry-run and apply the output.")
    result = subprocess.run([kubectl, "apply", "-f", "-"], input=manifest, stdout=subprocess.PIPE, text=True, check=False)
    sys.stdout.write(result.stdout)
    if result.returncode:
        return ExitCode.FAILED
    if not re.search(r"^rayjob\S* created", result.stdout, re.MULTILINE):
        namespace = config.cluster.kubernetes.namespace
        delete = f"kubectl delete rayjob {job_name(config)}" + ("" if namespace is None else f" --namespace {namespace}")
        remedy = f"If it has ended, run {delete}, then the same command."
        sys.stderr.write(f"{job_name(config)}: this job exists already, and does not start again. {remedy}\n")
    return ExitCode.DONE


def render(config: RunConfig) -> str:
    """Return a ConfigMap and a RayJob in YAML. Raises InputError with one line for each problem."""
    if problems := list(_problems(config)):
        raise InputError("\n".join(problems))
    target = config.cluster.kubernetes
    ranks = config.cluster.ranks_per_node or target.gpus
    if ranks:
        largest_layout(config.train, config.parallel, config.cluster.max_nodes * ranks)  # raises if they cannot share a batch
    in_pod = config.model_copy(update={"cluster": config.cluster.model_copy(update={"ranks_per_node": ranks or None})})
    return fill(
        "rayjob.yaml.jinja",
        name=job_name(config),
        target=target,
        nodes=config.cluster.max_nodes,
        gpus=_gpus(config),
        run_dir=str(config.run.dir),
        config=in_pod.to_yaml().rstrip(),
        config_mount=CONFIG_MOUNT,
        config_file=f"{CONFIG_MOUNT}/run.yaml",
        stop_timeout=math.ceil(config.cluster.grace_period) + SLACK,
        health=HEALTH,
        object_store_bytes=OBJECT_STORE_BYTES,
    )


def job_name(config: RunConfig) -> str:
    """Return cluster.kubernetes.name, or the last part of run.dir and a digest of the whole path, so that names are unique."""
    if (name := config.cluster.kubernetes.name) is not None:
        return name
    readable = re.sub(r"[^a-z0-9]+", "-", config.run.dir.name.lower()).strip("-")
    digest = hashlib.sha256(normpath(config.run.dir).encode()).hexdigest()[:6]
    return f"run-{readable[:36].rstrip('-')}-{digest}"


def _gpus(config: RunConfig) -> int | None:
    gpus = config.cluster.kubernetes.gpus
    return config.cluster.ranks_per_node if gpus is None else gpus


def _problems(config: RunConfig) -> Iterator[str]:
    """Yield the reasons why pods could not run the config."""
    target, ranks = config.cluster.kubernetes, config.cluster.ranks_per_node
    key = "cluster.kubernetes"
    if target.image is None:
        yield f"{key}.image: expected an image with manta, got none. Set {key}.image=registry.example.com/manta:1.0."
    if target.claim is None:
        yield f"{key}.claim: expected the PersistentVolumeClaim that holds run.dir, got none. Set it."
    if _gpus(config) is None:
        yield f"{key}.gpus: expected the GPUs of a node, got none. Set it, for example to 8, or to 0 to train on CPUs."
    elif target.gpus and ranks and ranks > target.gpus:
        yield f"cluster.ranks_per_node: expected at most {key}.gpus ({target.gpus}), got {ranks}. Lower it."
    expected, remedy = f"a path below {target.mount}, where pods mount the claim", "Copy it there: pods do not see files of this machine."
    yield from location_problems(config, root=target.mount, expected=expected, remedy=remedy)
    cache = config.data.cache.directory
    if not cache.is_absolute() and cache.parts[:1] != ("~",):
        yield f"data.cache.directory: expected an absolute path, or one below ~, got {cache}. Change it to one on a node's disk."
