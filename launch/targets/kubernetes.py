"""Kubernetes: a RayJob of KubeRay, with a head pod that supervises the run, and a pod for each node that trains.

The manifest is a pure function of the config. It contains no secrets, only their names.
"""

import hashlib
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from os.path import normpath
from typing import Any

import yaml

from manta.cluster.config import CONFIG_MOUNT
from manta.cluster.protocol import ExitCode
from manta.cluster.ray.hosts import OBJECT_STORE_BYTES
from manta.cluster.ray.private_ray import HEALTH
from manta.data.errors import InputError
from manta.launch.config import RunConfig
from manta.launch.targets.paths import location_problems
from manta.trainer.dist.layout import largest_layout

CONFIG = f"{CONFIG_MOUNT}/run.yaml"
RAY_VERSION = "2.54.0"  # the oldest that manta supports; KubeRay needs any version to enable tokens, and checks nothing else
SLACK = 15  # seconds beyond cluster.grace_period, for the controller's last messages
SHUTDOWN = 45  # seconds for Ray itself to exit
TTL = 60  # seconds that an ended job keeps its pods, because its last lines are read from the head
RAY_ENVIRONMENT = {
    # The operator sets it as well. One too old for authOptions drops those: then Ray finds no token and refuses to start.
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # agents request no GPU, but their ranks must see all
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
NO_GPU = {"NVIDIA_VISIBLE_DEVICES": "void"}  # CUDA images expose all GPUs if the pod requests none
OBJECT_STORE = {"object-store-memory": str(OBJECT_STORE_BYTES)}  # small: ranks need /dev/shm, and send nothing through Ray

Manifest = dict[str, Any]


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
    metadata: Manifest = {"name": job_name(config), "namespace": target.namespace}
    labels = {"app.kubernetes.io/managed-by": "manta"}
    queue = {"kueue.x-k8s.io/queue-name": target.queue}
    run = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata | {"labels": labels}, "data": {"run.yaml": in_pod.to_yaml()}}
    job = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata | {"labels": labels | queue}, "spec": _job(config)}
    return yaml.dump_all([run, job], Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20)


def job_name(config: RunConfig) -> str:
    """Return cluster.kubernetes.name, or the last part of run.dir and a digest of the whole path, so that names are unique."""
    if (name := config.cluster.kubernetes.name) is not None:
        return name
    readable = re.sub(r"[^a-z0-9]+", "-", config.run.dir.name.lower()).strip("-")
    digest = hashlib.sha256(normpath(config.run.dir).encode()).hexdigest()[:6]
    return f"run-{readable[:36].rstrip('-')}-{digest}"


def _job(config: RunConfig) -> Manifest:
    target, gpus = config.cluster.kubernetes, _gpus(config)
    resources: Manifest = {"cpu": str(target.head_cpus), "memory": target.head_memory}
    stop = {"RAY_JOB_STOP_WAIT_TIME_S": str(_stop_timeout(config))}  # between SIGTERM and SIGKILL for the controller
    mount = {"name": "run", "mountPath": CONFIG_MOUNT, "readOnly": True}
    volume = {"name": "run", "configMap": {"name": job_name(config)}}
    head = _pod(config, "ray-head", resources, RAY_ENVIRONMENT | HEALTH | stop | NO_GPU, mount=mount, volume=volume)

    resources = {"cpu": str(target.cpus), "memory": target.memory, "nvidia.com/gpu": gpus or None}
    mount = {"name": "shared-memory", "mountPath": "/dev/shm"}  # noqa: S108  the pod's
    volume = {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": target.shared_memory}}
    node = _pod(config, "ray-worker", resources, RAY_ENVIRONMENT if gpus else RAY_ENVIRONMENT | NO_GPU, mount=mount, volume=volume)
    tolerations = [{"key": key, "operator": "Exists"} for key in target.tolerations]
    node |= {"nodeSelector": target.node_selector or None, "tolerations": tolerations or None}

    workers = {
        "groupName": "node",
        **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), config.cluster.max_nodes),
        "rayStartParams": OBJECT_STORE,
        "template": {"spec": node},
    }
    cluster = {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token", "secretName": target.token_secret},
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0", "num-gpus": "0", **OBJECT_STORE}, "template": {"spec": head}},
        "workerGroupSpecs": [workers],
    }
    return {
        "entrypoint": f"{target.python} -P -m manta.launch train {CONFIG} --on auto",
        "submissionMode": "K8sJobMode",
        "backoffLimit": target.backoff_limit,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": TTL,
        "rayClusterSpec": cluster,
    }


def _pod(
    config: RunConfig, name: str, resources: Manifest, environment: Mapping[str, str], *, mount: Manifest, volume: Manifest
) -> Manifest:
    """Return what head and nodes have in common. Requests equal limits: such pods are evicted last, and Ray counts by them."""
    target, timeout = config.cluster.kubernetes, _stop_timeout(config)
    stop = [target.python, "-P", "-m", "manta.launch.targets.pre_stop", CONFIG, str(config.run.dir), str(timeout)]
    container = {
        "name": name,
        "image": target.image,
        "resources": {"requests": resources, "limits": resources},
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "envFrom": [{"secretRef": {"name": secret}} for secret in target.secrets] or None,
        "lifecycle": {"preStop": {"exec": {"command": stop}}},
        "volumeMounts": [{"name": "storage", "mountPath": target.mount}, mount],
    }
    return {
        "serviceAccountName": target.service_account,
        "terminationGracePeriodSeconds": timeout + SHUTDOWN,
        "containers": [container],
        "volumes": [{"name": "storage", "persistentVolumeClaim": {"claimName": target.claim}}, volume],
    }


def _stop_timeout(config: RunConfig) -> int:
    """Return the seconds that a pod waits for the run to save and exit."""
    return math.ceil(config.cluster.grace_period) + SLACK


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
    url_remedy = f"Put it into a secret, and add that to {key}.secrets."
    yield from location_problems(config, root=target.mount, expected=expected, remedy=remedy, url_remedy=url_remedy)
    cache = config.data.cache.directory
    if not cache.is_absolute() and cache.parts[:1] != ("~",):
        yield f"data.cache.directory: expected an absolute path, or one below ~, got {cache}. Change it to one on a node's disk."


class _Dumper(yaml.SafeDumper):
    """Omits keys without a value, writes multi-line strings as blocks, and quotes what other YAML readers take for numbers or booleans."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True

    def mapping(self, data: Manifest) -> yaml.MappingNode:
        return self.represent_dict({key: value for key, value in data.items() if value is not None})

    def text(self, data: str) -> yaml.ScalarNode:
        style = "|" if "\n" in data else '"' if re.fullmatch(r"[yYnN]|[-+.\d].*", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(dict, _Dumper.mapping)
_Dumper.add_representer(str, _Dumper.text)
