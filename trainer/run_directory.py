"""A run directory: the files of a run and its lock."""

import fcntl
import json
import os
import shlex
import stat
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from manta.data.config_history import upgrade
from manta.data.errors import InputError, one_line
from manta.data.shards.manifest import PreparedData
from manta.data.storage.location import local_path
from manta.data.storage.regular_file import open_regular, read_regular
from manta.trainer.checkpoint.backend import CheckpointBackend
from manta.trainer.checkpoint.manifest import step_of_name
from manta.trainer.checkpoint.storage import open_backend
from manta.trainer.config.model import ModelConfig
from manta.trainer.config.training import TrainingConfig
from manta.trainer.config.yaml_file import read_yaml
from manta.trainer.guard.record import Ranges, read_spikes, rolled_back

MATH_KEYS = ("family", "heads", "rope_theta", "norm_epsilon", "qk_norm", "logit_soft_cap", "sliding_window")
MATH_KEYS_OF_EXPERTS = ("top_k", "score", "normalize", "scale", "shared")
"""Keys of a model section that change what its weights compute, and not their shapes."""


MAX_MANIFEST = 1 << 24  # bytes
KINDS = {stat.S_IFDIR: "a directory", stat.S_IFREG: "a file", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


class RunManifest(BaseModel):
    """manifest.json: what was recorded when the run started. It may have more keys."""

    model_config = ConfigDict(frozen=True, extra="allow")

    manta: str = "unknown"
    """The version that the run was started with."""
    corpus: PreparedData
    code: str | None = None
    """Where the user's own model is imported from."""
    start_from: str | None = None
    """The checkpoint that the run started from."""

    @model_validator(mode="after")
    def _has_paths(self) -> Self:
        if any("\0" in path for path in (str(self.corpus.tokenizer), *self.corpus.corpora, self.code or "", self.start_from or "")):
            raise ValueError("expected paths, got one with a NUL")
        return self


class RunDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.manifest_file = path / "manifest.json"
        self.metrics_file = path / "metrics.jsonl"
        self.events_file = path / "events.jsonl"
        self.spikes_file = path / "spikes.jsonl"
        self.samples_file = path / "samples.jsonl"  # texts generated with its checkpoints
        self.tokenizer_file = path / "tokenizer.json"  # a copy: weights are of little use without their tokenizer
        self.lock_file = path / "lock"
        self.save_request_file = path / "save-now"  # a client creates it; the run deletes it when the checkpoint is written
        self.stop_request_file = path / "stop-now"  # a client creates it; the run saves and exits, and its controller deletes it
        self.logs = path / "logs"  # a directory per attempt, with a file per rank
        self.quoted = shlex.quote(str(path))  # as a shell reads it

    def log(self, attempt: int, rank: int) -> Path:
        return self.logs / f"attempt-{attempt:04d}" / f"rank-{rank:04d}.log"

    def check(self) -> None:
        """Raise InputError if the directory or a file in it cannot be read, or is something else: a named pipe would wait for ever."""
        _check_kind(self.path, stat.S_IFDIR, "a run directory")
        _check_kind(self.logs, stat.S_IFDIR, "a directory")
        files = (self.config_file, self.manifest_file, self.metrics_file, self.events_file, self.spikes_file, self.tokenizer_file)
        for file in (*files, self.samples_file, self.lock_file, self.save_request_file, self.stop_request_file):
            _check_kind(file, stat.S_IFREG, "a regular file")

    def open_checkpoints(self) -> CheckpointBackend:
        """Return the run's checkpoints, at the checkpoint.directory of its config."""
        try:
            directory = upgrade(read_yaml(self.config_file))["checkpoint"]["directory"]
        except (InputError, TypeError, KeyError):
            directory = None  # an import or a new run; `config` reports an invalid config
        return self.checkpoints_in(directory if isinstance(directory, str) else None)

    def checkpoints_in(self, directory: str | None) -> CheckpointBackend:
        """Return the checkpoints at this checkpoint.directory. None: its default, in the run directory."""
        return open_backend(directory or self.path / "checkpoints")

    def saved_step(self) -> int:
        """Return the step of the newest committed checkpoint, whose content is not checked; 0 if there is none."""
        return next((step for name in self.open_checkpoints().names() if (step := step_of_name(name))), 0)

    @property
    def has_trained(self) -> bool:
        """Whether the run has taken a step. From then on its config and corpus are fixed."""
        return self.metrics_file.exists() or bool(self.open_checkpoints().names())

    def config(self) -> TrainingConfig:
        """Return the sections that a rank reads: all but `cluster`."""
        try:
            sections = upgrade(read_yaml(self.config_file))
            sections.pop("cluster", None)
            return TrainingConfig.model_validate_json(json.dumps(sections), strict=True)
        except InputError:
            raise
        except (TypeError, ValueError, RecursionError) as error:
            raise _not_written_by_manta(self.config_file, error) from None

    def rolled_back(self) -> Ranges:
        """Return the samples that the run excludes because of spikes. Raises InputError if they cannot be read."""
        try:
            return rolled_back(read_spikes(self.spikes_file))
        except OSError as error:
            raise _not_written_by_manta(self.spikes_file, error) from None

    def manifest(self) -> RunManifest:
        """Return what was recorded when the run started. Raises InputError if that cannot be read."""
        try:
            return RunManifest.model_validate_json(read_regular(self.manifest_file, MAX_MANIFEST))
        except (OSError, ValueError) as error:
            raise _not_written_by_manta(self.manifest_file, error) from None

    def model_differences(self, model: ModelConfig) -> list[str]:
        """Return how `model` differs from the model that was trained or imported here. Shapes are not compared: loading compares them."""
        file = self.path / "model.yaml"
        try:
            trained = ModelConfig.model_validate(upgrade(read_yaml(file), "model")) if file.exists() else self.config().model
        except ValidationError as error:
            raise _not_written_by_manta(file, error) from None
        before, now = _math(trained), _math(model)
        return [f"model.{key} {before[key]} -> {now[key]}" for key in now if now[key] != before[key]]

    def prepared(self) -> PreparedData:
        """Return the corpus and tokenizer that the run reads."""
        prepared = self.manifest().corpus
        return prepared.model_copy(update={"tokenizer": self.tokenizer_file}) if self.tokenizer_file.exists() else prepared

    @property
    def code(self) -> Path:
        """Where the user's own model is imported from: the directory the run was started in; if that is gone, the working directory."""
        recorded = self.manifest().code if self.manifest_file.exists() else None
        return Path(recorded) if recorded and Path(recorded).is_dir() else Path.cwd()

    def lock(self) -> AbstractContextManager[object]:
        """Create the directory and lock it against a second run, until the context or this process ends, however that ends.

        Raises InputError if the directory cannot be created, or if another process holds the lock.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return FileLock(self.lock_file).acquire(timeout=1)  # `is_locked` of another process holds it for an instant
        except Timeout:
            remedy = f"Wait for it, or stop it: manta stop {self.quoted}"
            raise InputError(f"{self.path}: expected a run that is not running, got one that another manta is running. {remedy}") from None
        except OSError as error:
            expected = "a directory that can be written"
            raise InputError(f"run.dir: expected {expected}, got {self.path}: {error.strerror}. Use another directory.") from None

    @property
    def is_locked(self) -> bool:
        """Whether a process is running the run. Only reads, because the run may belong to another user."""
        try:
            with open_regular(self.lock_file) as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


def resolve_start_from(start: str) -> tuple[CheckpointBackend, str | None]:
    """Return the checkpoints that run.start_from refers to, and the name of one of them; None means the newest valid one."""
    parent, _, name = start.rstrip("/").rpartition("/")
    if step_of_name(name) is not None:
        return open_backend(parent), name
    path = local_path(start)
    if path is None:
        return open_backend(start), None
    run_dir = RunDirectory(path)
    run_dir.check()
    return run_dir.open_checkpoints(), None


def tokenizer_beside(checkpoints: CheckpointBackend) -> Path:
    """Return the tokenizer of the run, or import, that wrote the checkpoints. Raises InputError if it is not stored beside them."""
    file = Path(str(checkpoints)).parent / "tokenizer.json"
    if not file.exists():
        expected = "weights in RUN/checkpoints, beside their tokenizer.json"
        raise InputError(f"run.match_tokens: expected {expected}, got weights in {checkpoints}. Copy the tokenizer to {file}.")
    return file


def _math(model: ModelConfig) -> dict[str, object]:
    experts: dict[str, object] = {f"experts.{key}": getattr(model.experts, key, None) for key in MATH_KEYS_OF_EXPERTS}
    return experts | {key: getattr(model, key) for key in MATH_KEYS} | {"kv_heads": model.kv, "head_width": model.head_dim}


def _check_kind(path: Path, kind: int, expected: str) -> None:
    """Raise InputError if there is something at the path that is not of this kind, or cannot be read. Links are followed."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.is_symlink():
            return
        got = f"a link to {path.readlink()}, which does not exist"
    except OSError as error:
        got = f"an error: {error.strerror}"
    else:
        needed = os.R_OK | os.X_OK if kind == stat.S_IFDIR else os.R_OK
        if stat.S_IFMT(mode) == kind and os.access(path, needed, effective_ids=True):
            return
        got = "no permission to read it" if stat.S_IFMT(mode) == kind else KINDS.get(stat.S_IFMT(mode), "a device")
    raise InputError(f"{path}: expected {expected}, got {got}. Restore it, or name another run directory.")


def _not_written_by_manta(file: Path, error: Exception) -> InputError:
    message = one_line(error)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        message = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    if isinstance(error, OSError):
        return InputError(f"{file}: expected a file of a run directory, got an error: {error.strerror}. Start a run with manta train FILE.")
    return InputError(f"{file}: expected the file that manta wrote, got an error: {message}. Restore it.")
