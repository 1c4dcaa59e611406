"""What a target needs to know that runs are launched on: sections of `cluster`, read where `--on` names the target."""

import re
from collections.abc import Mapping
from os.path import normpath
from typing import Annotated, Any, Self, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

CONFIG_MOUNT = "/manta"  # where the head has run.yaml
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_LABEL = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"  # RFC 1123, as Kubernetes takes it
_SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"
_VALUE = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
_KEY = rf"({_SUBDOMAIN}/)?{_VALUE}"


def _matched(value: str, expression: str, longest: int, wants: str) -> str:
    if len(value) > longest or not re.fullmatch(expression, value):
        raise ValueError(f"got {value!r}, wants {wants}; change it")
    return value


def _job_name(value: str) -> str:
    # KubeRay appends to it, and what comes of that is a label: rayjob names of more than 47 characters are refused.
    return _matched(value, r"[a-z]([a-z0-9-]*[a-z0-9])?", 47, "at most 47 of a-z, 0-9 and -, the first a letter")


def _namespace(value: str) -> str:
    return _matched(value, _LABEL, 63, "a namespace: at most 63 of a-z, 0-9 and -")


def _name(value: str) -> str:
    return _matched(value, _SUBDOMAIN, 253, "an object's name: a-z, 0-9, - and .")


def _queue(value: str) -> str:
    return _matched(value, _SUBDOMAIN, 63, "a queue's name: at most 63 of a-z, 0-9, - and .")


def _taint(value: str) -> str:
    return _matched(value, _KEY, 317, "the key of a taint, such as nvidia.com/gpu")


def _image(value: str) -> str:
    return _matched(value, r"[a-z0-9][\w.:/@-]*", 512, "an image, such as registry.example.com/manta:1.0")


def _path(value: str) -> str:
    # No shell needs to quote it: KubeRay passes the command through two of them.
    wants = "an absolute path of letters, digits and . _ + -"
    if normpath(value) != value:
        raise ValueError(f"got {value!r}, wants {wants}, without .. or a / too many; change it")
    return _matched(value, r"(/[\w.+-]+)+", 4096, wants)


def _quantity(value: str) -> str:
    bytes_of(value)
    return value


Name = Annotated[str, AfterValidator(_name)]
Absolute = Annotated[str, AfterValidator(_path)]
Quantity = Annotated[str, AfterValidator(_quantity)]


def bytes_of(quantity: str) -> float:
    """64Gi -> 68 719 476 736. Raises ValueError where it is no quantity of memory."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]i?|Ki)", quantity)
    if not found or found[2] not in _UNITS or float(found[1]) == 0:
        raise ValueError(f"got {quantity!r}, wants memory as Kubernetes spells it: 64Gi, 512Mi, 1.5Ti; change it")
    return float(found[1]) * _UNITS[found[2]]


class Kubernetes(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    image: Annotated[str, AfterValidator(_image)] | None = Field(default=None, examples=["registry.example.com/manta:1.0"])
    """The image of all pods, with manta and ray[default] in it."""
    python: Absolute = "/usr/local/bin/python3"
    """The interpreter, in the image, that has manta."""
    name: Annotated[str, AfterValidator(_job_name)] | None = Field(default=None, examples=["mine"])
    """What job and config are called; made from run.dir where left out."""
    namespace: Annotated[str, AfterValidator(_namespace)] | None = Field(default=None, examples=["training"])
    """Where they are made; kubectl's own namespace where left out."""
    claim: Name | None = Field(default=None, examples=["training-data"])
    """The PersistentVolumeClaim (ReadWriteMany) that holds run.dir; all pods mount it."""
    mount: Absolute = "/mnt/manta"
    """Where they mount it."""
    gpus: int | None = Field(default=None, ge=0, examples=[8])
    """GPUs a node, all that it has: whole nodes train. cluster.ranks_per_node where left out; 0 trains on CPUs."""
    cpus: int = Field(default=8, ge=1)
    """Cores a node."""
    memory: Quantity = "64Gi"
    """Memory a node, what is used of shared_memory included."""
    shared_memory: Quantity = "16Gi"
    """Largest size of /dev/shm, which NCCL uses between the GPUs of a node."""
    head_cpus: int = Field(default=4, ge=1)
    """Cores of the pod that supervises the run, and prepares its corpus; it trains nothing."""
    head_memory: Quantity = "16Gi"
    """Memory of that pod."""
    queue: Annotated[str, AfterValidator(_queue)] | None = Field(default=None, examples=["research"])
    """Kueue's LocalQueue that admits the job, all its nodes at once; where left out, it is not queued."""
    token_secret: Name | None = Field(default=None, examples=["ray-token"])
    """A secret that holds Ray's token under auth_token; where left out, KubeRay makes a new one for each cluster."""
    secrets: tuple[Name, ...] = Field(default=(), examples=['["bucket-access"]'])
    """Names of secrets whose keys become environment variables in all pods, such as AWS_ACCESS_KEY_ID; a later one wins."""
    service_account: Name | None = Field(default=None, examples=["trainer"])
    """The service account of all pods; the namespace's default where left out."""
    node_selector: dict[str, str] = Field(default={}, examples=["{pool: h100}"])
    """Labels that a machine must have to train."""
    tolerations: tuple[Annotated[str, AfterValidator(_taint)], ...] = Field(default=(), examples=['["nvidia.com/gpu"]'])
    """Keys of taints on machines that may train in spite of them."""
    backoff_limit: int = Field(default=3, ge=0)
    """How often a job that failed, or left and saved (75), is run again, on a new Ray cluster. Kueue's preemptions do not count."""

    @field_validator("node_selector", mode="before")
    @classmethod
    def _selects_by_labels(cls, value: object) -> object:
        """Told here for the whole mapping: its keys are the user's, and no keys of ours."""
        if not isinstance(value, Mapping):
            return value
        for key, wanted in cast("Mapping[str, Any]", value).items():
            if not isinstance(wanted, str):
                raise ValueError(f"got {wanted!r} for {key!r}, wants a text; put it in quotes")  # noqa: TRY004  pydantic wants ValueErrors
            _matched(key, _KEY, 317, "a label's key, such as pool or example.com/pool")
            if wanted:
                _matched(wanted, _VALUE, 63, f"a label's value for {key!r}")
        return cast("object", value)

    @field_validator("mount")
    @classmethod
    def _is_free(cls, value: str) -> str:
        if f"/{value.split('/')[1]}" in {CONFIG_MOUNT, "/dev", "/etc", "/proc", "/sys", "/usr"}:
            raise ValueError(f"got {value!r}, where pods have something else; try /mnt/manta")
        return value

    @model_validator(mode="after")
    def _shared_memory_is_memory(self) -> Self:
        if bytes_of(self.shared_memory) >= bytes_of(self.memory):
            raise ValueError(f"shared_memory: got {self.shared_memory}, wants less than memory {self.memory}, which holds it; lower it")
        return self


def _directive(value: str) -> str:
    return _matched(value, r"[^\s\"'`$\\;&|<>()]+", 512, "one word, as it stands after = in an #SBATCH line")


def _duration(value: str) -> str:
    return _matched(value, r"(\d+-)?\d+(:\d+){0,2}", 32, "a time as SLURM has it: minutes, hours:minutes:seconds, or days-hours")


def _text(value: object) -> object:
    return str(value) if type(value) is int else value


Directive = Annotated[str, AfterValidator(_directive)]


class Ssh(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    options: tuple[str, ...] = Field(default=(), examples=['["-F", "cluster.ssh"]'])
    """Options of ssh, as they stand on its command line; most are better kept in ssh's own config."""


class Slurm(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    partition: Directive | None = Field(default=None, examples=["gpu"])
    """The partition; the site's default where left out."""
    account: Directive | None = Field(default=None, examples=["research"])
    """Who pays; the user's default where left out."""
    qos: Directive | None = Field(default=None, examples=["high"])
    """Quality of service; the site's default where left out."""
    time: Annotated[str, AfterValidator(_duration), BeforeValidator(_text)] | None = Field(default=None, examples=["24:00:00"])
    """The job's wall-clock limit; the partition's where left out."""
    warning: int = Field(default=180, ge=1)
    """Seconds before that limit when the run is told to save and leave; cluster.grace_period has to fit into them."""
    requeue: bool = True
    """Queue the job again where its time was up, or it was preempted: it goes on where it stood."""
    exclusive: bool = True
    """Whole nodes, with nobody else on them."""
    gpus_per_node: int | None = Field(default=None, ge=0, examples=[8])
    """GPUs to ask for on each node; none where left out, for sites that give them with the node."""
    constraint: Directive | None = Field(default=None, examples=["h100"])
    """Features that nodes must have."""
    options: tuple[Directive, ...] = Field(default=(), examples=['["--mem=0"]'])
    """Any other options of sbatch, one each."""
    modules: tuple[Directive, ...] = Field(default=(), examples=['["cuda/13.0"]'])
    """Modules to load, in this order."""
    container: Directive | None = Field(default=None, examples=["/images/manta.sqsh"])
    """The image that nodes run in, for sites with Pyxis; manta has to be in it, at cluster.slurm.python."""
    mounts: tuple[Directive, ...] = Field(default=(), examples=['["/data"]'])
    """What the container sees of the node: path, or path:inside. The run directory has to be among it."""
    python: Directive | None = Field(default=None, examples=["/opt/manta/bin/python"])
    """The interpreter that has manta, on every node; this one where left out."""

    @model_validator(mode="after")
    def _options_are_options(self) -> Self:
        for option in self.options:
            if not option.startswith("--"):
                raise ValueError(f"options: got {option!r}, wants options of sbatch as --name=value; mend it")
        return self
