"""The `cluster` section of a config: nodes, timeouts and restarts, and the launch targets: ssh, SLURM and Kubernetes."""

import math
import re
from collections.abc import Callable, Mapping
from os.path import expanduser, normpath
from typing import Annotated, Any, Self, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from manta.cluster.environment import set_by_the_run

_DURATION = re.compile(r"(?:(\d{1,6})-)?(\d{1,6}):([0-5]\d):([0-5]\d)")
_SECRETS = frozenset(["TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASS", "PASSPHRASE", "KEY", "APIKEY", "CREDENTIAL"])  # words of a name
_RANGE = re.compile(r"([1-9]\d{0,5})(?:\.\.([1-9]\d{0,5}))?")
CONFIG_MOUNT = "/manta"  # directory of run.yaml in the head pod
_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_LABEL = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"  # RFC 1123, as Kubernetes requires
_SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"
_VALUE = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
_KEY = rf"({_SUBDOMAIN}/)?{_VALUE}"


def _matching(expression: str, max_length: int, expected: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if len(value) > max_length or not re.fullmatch(expression, value):
            raise ValueError(f"expected {expected}, got {value!r}. Change it.")
        return value

    return check


def _normalized(value: str) -> str:
    if normpath(value) != value:
        raise ValueError(f"expected a path without .. and repeated slashes, got {value!r}. Change it.")
    return value


def _quantity(value: str) -> str:
    _bytes_of(value)
    return value


def _bytes_of(quantity: str) -> float:
    """64Gi -> 68 719 476 736."""
    match = re.fullmatch(rf"(\d{{1,15}}(?:\.\d{{1,15}})?)({'|'.join(_UNITS)})", quantity)
    if not match or float(match[1]) == 0:
        raise ValueError(f"expected a quantity of memory, got {quantity!r}. Write it as Kubernetes does: 64Gi, 512Mi, 1.5Ti.")
    return float(match[1]) * _UNITS[match[2]]


# KubeRay appends to a job's name and uses it as a label: it refuses names of more than 47 characters.
JobName = Annotated[
    str, AfterValidator(_matching(r"[a-z]([a-z0-9-]*[a-z0-9])?", 47, "at most 47 of a-z, 0-9 and -, starting with a letter"))
]
Namespace = Annotated[str, AfterValidator(_matching(_LABEL, 63, "a namespace of at most 63 of a-z, 0-9 and -"))]
ObjectName = Annotated[str, AfterValidator(_matching(_SUBDOMAIN, 253, "an object's name of a-z, 0-9, - and ."))]
QueueName = Annotated[str, AfterValidator(_matching(_SUBDOMAIN, 63, "a queue's name of at most 63 of a-z, 0-9, - and ."))]
Taint = Annotated[str, AfterValidator(_matching(_KEY, 317, "the key of a taint, such as nvidia.com/gpu"))]
Image = Annotated[str, AfterValidator(_matching(r"[a-z0-9][\w.:/@-]*", 512, "an image, such as registry.example.com/manta:1.0"))]
# KubeRay passes the command through two shells: a path must need no quotes.
AbsolutePath = Annotated[
    str, AfterValidator(_normalized), AfterValidator(_matching(r"(/[\w.+-]+)+", 4096, "an absolute path of letters, digits and . _ + -"))
]
Quantity = Annotated[str, AfterValidator(_quantity)]
Directive = Annotated[str, AfterValidator(_matching(r"[^\s\"'`$\\;&|<>()]+", 512, "one word, as it follows = in an #SBATCH line"))]
PathDirective = Annotated[Directive, AfterValidator(lambda paths: ":".join(map(expanduser, paths.split(":"))))]
SlurmTime = Annotated[
    str,
    AfterValidator(_matching(r"(\d+-)?\d+(:\d+){0,2}", 32, "a time in SLURM's form: minutes, hours:minutes:seconds, or days-hours")),
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
]


def _lines(value: object) -> object:
    """Accept a list and a block of text."""
    lines = value.splitlines() if isinstance(value, str) else value
    return tuple(cast("list[object]", lines)) if isinstance(lines, list) else lines


Count = Annotated[int, Field(le=2**40)]
Seconds = Annotated[float, Field(le=2e6)]
"""23 days: about the longest time that the system can wait for."""


class ClusterSection(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Kubernetes(ClusterSection):
    image: Image | None = Field(default=None, examples=["registry.example.com/manta:1.0"])
    """The image of all pods, with manta and ray[default] installed."""
    python: AbsolutePath = "/usr/local/bin/python3"
    """The image's Python interpreter that has manta installed."""
    name: JobName | None = Field(default=None, examples=["mine"])
    """Name of the job and its ConfigMap; made from run.dir if unset."""
    namespace: Namespace | None = Field(default=None, examples=["training"])
    """Namespace of the job; kubectl's own if unset."""
    claim: ObjectName | None = Field(default=None, examples=["training-data"])
    """The PersistentVolumeClaim (ReadWriteMany) that holds run.dir; all pods mount it."""
    mount: AbsolutePath = "/mnt/manta"
    """Where pods mount the claim."""
    gpus: Count | None = Field(default=None, ge=0, examples=[8])
    """GPUs per node; must be all GPUs of the machine. Default: cluster.ranks_per_node; 0 trains on CPUs."""
    cpus: Count = Field(default=8, ge=1)
    """Cores per node."""
    memory: Quantity = "64Gi"
    """Memory per node; /dev/shm counts toward it."""
    shared_memory: Quantity = "16Gi"
    """Largest size of /dev/shm, which NCCL uses between the GPUs of a node."""
    head_cpus: Count = Field(default=4, ge=1)
    """Cores of the head pod, which supervises the run and prepares its corpus; it trains nothing."""
    head_memory: Quantity = "16Gi"
    """Memory of the head pod."""
    queue: QueueName | None = Field(default=None, examples=["research"])
    """Kueue's LocalQueue that admits the job, all its nodes at once; if unset, the job is not queued."""
    token_secret: ObjectName | None = Field(default=None, examples=["ray-token"])
    """A secret that holds Ray's token under auth_token; if unset, KubeRay makes a new one for each cluster."""
    secrets: tuple[ObjectName, ...] = Field(default=(), examples=['["bucket-access"]'])
    """Names of secrets whose keys become environment variables in all pods, such as AWS_ACCESS_KEY_ID; a later one wins."""
    service_account: ObjectName | None = Field(default=None, examples=["trainer"])
    """The service account of all pods; the namespace's default if unset."""
    node_selector: dict[str, str] = Field(default={}, examples=["{pool: h100}"])
    """Labels required of worker nodes."""
    tolerations: tuple[Taint, ...] = Field(default=(), examples=['["nvidia.com/gpu"]'])
    """Keys of taints that worker pods tolerate."""
    backoff_limit: Count = Field(default=3, ge=0)
    """Maximum reruns of a job that failed, or saved and exited with 75, each on a new Ray cluster. Kueue's preemptions are not counted."""

    @field_validator("node_selector", mode="before")
    @classmethod
    def _selects_by_labels(cls, value: object) -> object:
        """Check the mapping at once: its keys are the user's, so an error names node_selector, not one of them."""
        if not isinstance(value, Mapping):
            return value
        for key, label in cast("Mapping[str, Any]", value).items():
            if not isinstance(label, str):
                raise ValueError(f"expected a string for {key!r}, got {label!r}. Put it in quotes.")  # noqa: TRY004  pydantic requires it
            _matching(_KEY, 317, "a label's key, such as pool or example.com/pool")(key)
            _matching(rf"({_VALUE})?", 63, f"a label's value for {key!r}")(label)
        return cast("object", value)

    @field_validator("mount")
    @classmethod
    def _mounts_over_nothing(cls, value: str) -> str:
        if f"/{value.split('/')[1]}" in {CONFIG_MOUNT, "/dev", "/etc", "/proc", "/sys", "/usr"}:
            raise ValueError(f"expected a directory that pods do not use, got {value!r}. Try /mnt/manta.")
        return value

    @model_validator(mode="after")
    def _shared_memory_fits(self) -> Self:
        if _bytes_of(self.shared_memory) >= _bytes_of(self.memory):
            raise ValueError(f"shared_memory: expected less than memory ({self.memory}), got {self.shared_memory}. Lower it.")
        return self


class Ssh(ClusterSection):
    options: tuple[str, ...] = Field(default=(), examples=['["-F", "cluster.ssh"]'])
    """Options of ssh, as on its command line; most are better kept in ssh's own config."""


class Slurm(ClusterSection):
    partition: Directive | None = Field(default=None, examples=["gpu"])
    """The partition; the site's default if unset."""
    account: Directive | None = Field(default=None, examples=["research"])
    """The account to charge; the user's default if unset."""
    qos: Directive | None = Field(default=None, examples=["high"])
    """Quality of service; the site's default if unset."""
    time: SlurmTime | None = Field(default=None, examples=["24:00:00"])
    """The job's wall-clock limit; the partition's if unset."""
    warning: Count = Field(default=180, ge=1)
    """Seconds before that limit when the run is asked to save and exit; must be longer than cluster.grace_period."""
    requeue: bool = True
    """Queue the job again if its time was up or it was preempted; it then resumes."""
    exclusive: bool = True
    """Allocate whole nodes, shared with no other job."""
    gpus_per_node: Count | None = Field(default=None, ge=0, examples=[8])
    """GPUs to request on each node; none if unset, for sites that allocate them with the node."""
    constraint: Directive | None = Field(default=None, examples=["h100"])
    """Features that nodes must have."""
    options: tuple[Directive, ...] = Field(default=(), examples=['["--mem=0"]'])
    """Other options of sbatch, one each."""
    modules: tuple[Directive, ...] = Field(default=(), examples=['["cuda/13.0"]'])
    """Environment modules to load, in this order."""
    setup: Annotated[tuple[str, ...], BeforeValidator(_lines)] = Field(default=(), examples=['["ulimit -l unlimited"]'])
    """Shell lines that the job's script runs on its first node before everything else; SLURM passes exports and limits on to the others."""
    container: PathDirective | None = Field(default=None, examples=["/images/manta.sqsh"])
    """The image that everything of the run runs in, its controller too, for sites with Pyxis; needs cluster.slurm.python."""
    mounts: tuple[PathDirective, ...] = Field(default=(), examples=['["/data"]'])
    """Paths that the container mounts: path, or path:inside. The run directory must be in one of them."""
    python: PathDirective | None = Field(default=None, examples=["/opt/manta/bin/python"])
    """The interpreter that has manta installed, on every node, or in the container; the current one if unset."""

    @model_validator(mode="after")
    def _options_are_options(self) -> Self:
        for option in self.options:
            if not option.startswith("--"):
                raise ValueError(f"options: expected options of sbatch, got {option!r}. Write --name=value.")
        return self


def _node_range(nodes: int | str) -> int | str:
    match = _RANGE.fullmatch(str(nodes))
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f"expected a number of nodes or a range, got {nodes!r}. Write 4, or 2..8.")
    return nodes


def _duration(text: str) -> str:
    if _DURATION.fullmatch(text) is None:
        raise ValueError(f"expected hours:minutes:seconds, got {text!r}. Write 3:50:00, or 2-01:00:00 for days.")
    return text


def _environment(variables: object) -> object:
    """Check the mapping at once: its keys are the user's, so an error names cluster.environment, not one of them. Repeats no value."""
    if not isinstance(variables, Mapping):
        return variables
    checked: dict[str, str] = {}
    for name, value in cast("Mapping[Any, Any]", variables).items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w{0,255}", name, re.ASCII):
            raise ValueError(f"expected names of letters, digits and _, got {str(name)[:80]!r}. Correct it.")
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(f"expected text for {name}, got {type(value).__name__}. Put the value in quotes.")  # noqa: TRY004  as above
        checked[name] = str(value)
        if _SECRETS & set(name.upper().split("_")) or re.search(r"://[^/@\s]*:[^/@\s]*@", checked[name]):
            remedy = "Export it where the run and its nodes are started; in Kubernetes, use cluster.kubernetes.secrets."
            raise ValueError(f"expected no secrets, because the run directory keeps them, got {name}. {remedy}")
        if why := set_by_the_run(name):
            raise ValueError(f"expected variables that the run does not set or remove, got {name} ({why}). Remove it.")
        if "\0" in checked[name]:
            raise ValueError(f"expected text without NUL for {name}. Correct it.")
    return checked


class ClusterConfig(ClusterSection):
    nodes: Annotated[int | str, AfterValidator(_node_range)] = 1
    """Nodes to run on. `4` starts on 4, continues on fewer if some are lost, and returns to 4. `2..8` runs on 2 to 8, as many as are
    available, and waits while fewer than 2 are. On one machine, 2 or more simulate a cluster."""
    ranks_per_node: Count | None = Field(default=None, ge=1)
    """Ranks on each node. Unset: one per GPU; without a GPU two, or one on a single core."""
    start_timeout: Seconds = Field(default=600.0, gt=0)
    """Maximum seconds to wait for nodes, and without a heartbeat of a rank before its first step, while it compiles, or while it saves."""
    step_timeout: Seconds | None = Field(default=None, gt=0, examples=[300.0])
    """Maximum seconds between heartbeats during training steps; then the attempt counts as hung. Unset: learned (docs/recovery.md)."""
    node_timeout: Seconds = Field(default=30.0, gt=0)
    """Seconds without a response after which a node counts as lost, and the run continues without it."""
    grace_period: Seconds = Field(default=60.0, ge=0)
    """Seconds the ranks have to save and exit after a stop request."""
    stop_after: Annotated[str, AfterValidator(_duration)] | None = Field(default=None, examples=["3:50:00"])
    """Save and exit with 75 after this time (h:mm:ss): for jobs whose time limit sends no signal."""
    max_restarts_without_progress: Count = Field(default=3, ge=0)
    """Give up after this many consecutive restarts without a new highest step."""
    hot_standby: bool = True
    """Keep standby processes with everything imported, so that a restart takes tenths of a second. Costs their memory."""
    keep_logs: Count = Field(default=20, ge=1)
    """Number of newest attempts to keep logs of. A rank's log is only appended to, so logrotate (copytruncate) may truncate it."""
    environment: Annotated[dict[str, str], BeforeValidator(_environment)] = Field(default={}, examples=["{NCCL_IB_HCA: mlx5}"])
    """Environment variables of every rank, on every target, by name. They override those of the nodes. Not for secrets: export those."""
    ssh: Ssh = Ssh()
    """How `manta train --on ssh:FILE` reaches its hosts."""
    slurm: Slurm = Slurm()
    """What `manta train --on slurm` requests."""
    kubernetes: Kubernetes = Kubernetes()
    """What `manta train --on kubernetes` creates."""

    @property
    def stop_after_seconds(self) -> float:
        """Infinite if stop_after is unset."""
        if self.stop_after is None:
            return math.inf
        match = _DURATION.fullmatch(self.stop_after)
        assert match is not None
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def min_nodes(self) -> int:
        """Nodes needed to start."""
        return int(str(self.nodes).split("..", maxsplit=1)[0])

    @property
    def max_nodes(self) -> int:
        return int(str(self.nodes).rsplit("..", maxsplit=1)[-1])

    @property
    def min_nodes_to_continue(self) -> int:
        """Nodes needed to continue a run that has started."""
        return self.min_nodes if ".." in str(self.nodes) else 1
