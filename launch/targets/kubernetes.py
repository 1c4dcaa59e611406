"""A run as a RayJob of KubeRay: a pod that supervises, and a pod a node that trains.

The manifest is a pure function of the config. It holds no secret: names of them only.
"""

import hashlib
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from os.path import normpath
from pathlib import PurePosixPath
from typing import Any

import yaml

from manta.cluster.protocol import ExitCode
from manta.cluster.ray.hosts import OBJECT_STORE_BYTES
from manta.cluster.ray.private_ray import HEALTH
from manta.cluster.target_config import CONFIG_MOUNT, Kubernetes
from manta.data.errors import InputError
from manta.data.storage.location import local_path
from manta.launch.config import RunConfig
from manta.launch.targets.paths import password_in, places
from manta.trainer.dist.layout import largest_layout

CONFIG = f"{CONFIG_MOUNT}/run.yaml"
RAY = "2.54.0"  # the oldest that manta runs on: KubeRay wants one named before it turns on tokens, and looks no further
SLACK = 15  # seconds beyond cluster.grace_period: the controller has its own last words
SHUTDOWN = 45  # seconds that Ray itself may take to leave a pod
KEPT = 60  # seconds that an ended job keeps its pods: its last lines are fetched from the head
OF_RAY = {
    # The operator sets it too. One that is too old to know authOptions drops those: Ray then finds no token and refuses to start.
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # agents ask for no GPU, yet their ranks must see all
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
NO_GPU = {"NVIDIA_VISIBLE_DEVICES": "void"}  # CUDA's images ask for all of them where the pod asks for none

Tree = dict[str, Any]


def launch(config: RunConfig, *, nodes: int, dry_run: bool) -> int:
    """Hands the manifest to kubectl, or prints it. Gives the exit code. Raises InputError where the pods could not run it."""
    manifest = render(config, nodes=nodes)
    if dry_run:
        sys.stdout.write(manifest)
        return 0
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        remedy = "install it, or add --dry-run and apply what that prints"
        raise InputError(f"--on kubernetes: got no kubectl on PATH, wants it to hand the job over; {remedy}")
    done = subprocess.run([kubectl, "apply", "-f", "-"], input=manifest, stdout=subprocess.PIPE, text=True, check=False)
    sys.stdout.write(done.stdout)
    if done.returncode:
        return ExitCode.FAILED
    if not re.search(r"^rayjob\S* created", done.stdout, re.MULTILINE):
        namespace = config.cluster.kubernetes.namespace
        there = "" if namespace is None else f" --namespace {namespace}"
        remedy = f"where it has ended, kubectl delete rayjob {name(config)}{there}, then the same command"
        sys.stderr.write(f"{name(config)}: was there before, and does not begin again; {remedy}\n")
    return 0


def render(config: RunConfig, *, nodes: int) -> str:
    """A ConfigMap and a RayJob, in YAML. `nodes`: the most that the run may have. Raises InputError, a line for each thing amiss."""
    if problems := list(_problems(config)):
        raise InputError("\n".join(problems))
    target = config.cluster.kubernetes
    ranks = config.cluster.ranks_per_node or target.gpus
    if ranks:
        largest_layout(config.train, config.parallel, nodes * ranks)  # raises where they could not share a batch
    placed = config.model_copy(update={"cluster": config.cluster.model_copy(update={"ranks_per_node": ranks or None})})
    metadata: Tree = {"name": name(config), **_given(namespace=target.namespace)}
    labels = {"app.kubernetes.io/managed-by": "manta"}
    run = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata | {"labels": labels}, "data": {"run.yaml": placed.to_yaml()}}
    queued = labels | ({} if target.queue is None else {"kueue.x-k8s.io/queue-name": target.queue})
    job = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata | {"labels": queued}, "spec": _job(config, nodes)}
    return yaml.dump_all([run, job], Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20)


def name(config: RunConfig) -> str:
    """Of job and ConfigMap: as configured, or run.dir's last part and a digest of all of it, that no two runs share one."""
    if (given := config.cluster.kubernetes.name) is not None:
        return given
    readable = re.sub(r"[^a-z0-9]+", "-", config.run.dir.name.lower()).strip("-")
    digest = hashlib.sha256(normpath(config.run.dir).encode()).hexdigest()[:6]
    return f"run-{readable[:36].rstrip('-')}-{digest}"


def _job(config: RunConfig, nodes: int) -> Tree:
    target = config.cluster.kubernetes
    auth: Tree = {"mode": "token", **_given(secretName=target.token_secret)}
    head = {"rayStartParams": {"num-cpus": "0", "num-gpus": "0", **_store()}, "template": {"spec": _head(config)}}
    workers = {
        "groupName": "node",
        **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), nodes),
        "rayStartParams": _store(),
        "template": {"spec": _node(config)},
    }
    return {
        "entrypoint": f"{target.python} -P -m manta.launch train {CONFIG} --on auto",
        "submissionMode": "K8sJobMode",
        "backoffLimit": target.backoff_limit,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEPT,
        "rayClusterSpec": {"rayVersion": RAY, "authOptions": auth, "headGroupSpec": head, "workerGroupSpecs": [workers]},
    }


def _store() -> Tree:
    """Nothing of size passes through Ray's object store; /dev/shm is for the ranks."""
    return {"object-store-memory": str(OBJECT_STORE_BYTES)}


def _head(config: RunConfig) -> Tree:
    target = config.cluster.kubernetes
    stop = {"RAY_JOB_STOP_WAIT_TIME_S": str(_patience(config))}  # from SIGTERM to SIGKILL, for the controller
    pod = _pod(config, "ray-head", {"cpu": str(target.head_cpus), "memory": target.head_memory}, OF_RAY | HEALTH | stop | NO_GPU)
    pod["containers"][0]["volumeMounts"].append({"name": "run", "mountPath": CONFIG_MOUNT, "readOnly": True})
    pod["volumes"].append({"name": "run", "configMap": {"name": name(config)}})
    return pod


def _node(config: RunConfig) -> Tree:
    target = config.cluster.kubernetes
    gpus = _gpus(config)
    resources: Tree = {"cpu": str(target.cpus), "memory": target.memory} | ({"nvidia.com/gpu": gpus} if gpus else {})
    pod = _pod(config, "ray-worker", resources, OF_RAY if gpus else OF_RAY | NO_GPU)
    pod["containers"][0]["volumeMounts"].append({"name": "shared-memory", "mountPath": "/dev/shm"})  # noqa: S108  the pod's own
    pod["volumes"].append({"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": target.shared_memory}})
    selected = {"nodeSelector": target.node_selector} if target.node_selector else {}
    tolerated = {"tolerations": [{"key": key, "operator": "Exists"} for key in target.tolerations]} if target.tolerations else {}
    return pod | selected | tolerated


def _pod(config: RunConfig, container: str, resources: Tree, environment: Mapping[str, str]) -> Tree:
    """What head and nodes have in common. Requests are limits: such a pod is the last to be evicted, and Ray counts by them."""
    target = config.cluster.kubernetes
    leave = [target.python, "-P", "-m", "manta.launch.targets.pre_stop", CONFIG, str(config.run.dir), str(_patience(config))]
    secrets = {"envFrom": [{"secretRef": {"name": secret}} for secret in target.secrets]} if target.secrets else {}
    return {
        **_given(serviceAccountName=target.service_account),
        "terminationGracePeriodSeconds": _patience(config) + SHUTDOWN,
        "containers": [
            {
                "name": container,
                "image": target.image,
                "resources": {"requests": resources, "limits": resources},
                "env": [{"name": key, "value": value} for key, value in environment.items()],
                **secrets,
                "lifecycle": {"preStop": {"exec": {"command": leave}}},
                "volumeMounts": [{"name": "storage", "mountPath": target.mount}],
            }
        ],
        "volumes": [{"name": "storage", "persistentVolumeClaim": {"claimName": target.claim}}],
    }


def _patience(config: RunConfig) -> int:
    """Seconds from the word to leave until a pod stops waiting for the run."""
    return math.ceil(config.cluster.grace_period) + SLACK


def _gpus(config: RunConfig) -> int | None:
    target = config.cluster.kubernetes
    return config.cluster.ranks_per_node if target.gpus is None else target.gpus


def _problems(config: RunConfig) -> Iterator[str]:
    """What a pod would stumble over, in a line each."""
    target, ranks = config.cluster.kubernetes, config.cluster.ranks_per_node
    key = "cluster.kubernetes"
    if target.image is None:
        yield f"{key}.image: got nothing, wants an image with manta in it; try {key}.image=registry.example.com/manta:1.0"
    if target.claim is None:
        yield f"{key}.claim: got nothing, wants the PersistentVolumeClaim that holds run.dir; name it"
    if _gpus(config) is None:
        yield f"{key}.gpus: got nothing, wants the GPUs of a node; set it, 8 for example, or 0 to train on CPUs"
    elif target.gpus and ranks and ranks > target.gpus:
        yield f"cluster.ranks_per_node: got {ranks}, wants at most one a GPU, of which {key}.gpus gives a node {target.gpus}; lower it"
    yield from (problem for where, place in places(config) if (problem := _problem(where, place, target)))
    cache = config.data.cache.directory
    if not cache.is_absolute() and cache.parts[:1] != ("~",):
        yield f"data.cache.directory: got {cache}, wants an absolute path, or one below ~, on a node's own disk; change it"


def _problem(where: str, place: str, target: Kubernetes) -> str | None:
    if local_path(place) is None:
        return password_in(where, place, "put it into a secret, and name that in cluster.kubernetes.secrets")
    if PurePosixPath(target.mount) in PurePosixPath(normpath(place)).parents:
        return None
    wants = f"a path below {target.mount}, where pods have the claim{'' if where == 'run.dir' else ', or a URL such as s3://bucket/mine'}"
    return f"{where}: got {place}, wants {wants}; they do not see this machine's files"


def _given(**values: object) -> Tree:
    return {key: value for key, value in values.items() if value is not None}


class _Dumper(yaml.SafeDumper):
    """Text of several lines as such; and quotes where a YAML reader other than Python's would take a text for a number or a truth."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True

    def text(self, data: str) -> yaml.ScalarNode:
        style = "|" if "\n" in data else '"' if re.fullmatch(r"[yYnN]|[-+.\d].*", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.text)
