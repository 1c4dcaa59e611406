"""A run directory: what lies where. Whoever sees it can say all about the run."""

import fcntl
import json
import shlex
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from manta.data.config_history import upgrade
from manta.data.errors import InputError
from manta.data.shards.manifest import PreparedData
from manta.data.storage.location import local_path
from manta.trainer.checkpoint.backend import CheckpointBackend, open_backend
from manta.trainer.checkpoint.manifest import step_of_name
from manta.trainer.config.model import ModelConfig
from manta.trainer.config.training import TrainingConfig
from manta.trainer.config.yaml_file import read_yaml


def origin_of(start: str) -> tuple[CheckpointBackend, str | None]:
    """What run.start_from names: one checkpoint, by its name; or the newest of a run or an import, which has no name yet."""
    above, _, name = start.rstrip("/").rpartition("/")
    if step_of_name(name) is not None:
        return open_backend(above), name
    path = local_path(start)
    return open_backend(start) if path is None else RunDirectory(path).checkpoints, None


def tokenizer_of(checkpoints: CheckpointBackend) -> Path:
    """What the run, or the import, whose checkpoints lie there reads with. Raises InputError where it is not beside them."""
    file = Path(str(checkpoints)).parent / "tokenizer.json"
    if not file.exists():
        wants = "weights beside which lies their tokenizer.json, in RUN/checkpoints"
        raise InputError(f"run.match_tokens: got weights in {checkpoints}, wants {wants}; put it at {file}")
    return file


@dataclass(frozen=True, slots=True)
class RunDirectory:
    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest_file(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def tokenizer_file(self) -> Path:
        """What the run reads with, kept beside its weights: they are worth little without."""
        return self.path / "tokenizer.json"

    @property
    def lock_file(self) -> Path:
        return self.path / "lock"

    @property
    def checkpoints(self) -> CheckpointBackend:
        """Where they lie: beside the rest, or where the config says."""
        try:
            told = upgrade(read_yaml(self.config_file))["checkpoint"]["directory"]
        except (InputError, TypeError, KeyError):
            told = None  # an import, or nothing yet; what is wrong with a config is told by who reads it
        return self.checkpoints_of(told)

    def checkpoints_of(self, directory: str | None) -> CheckpointBackend:
        """Where they lie under this checkpoint.directory."""
        return open_backend(directory or self.path / "checkpoints")

    @property
    def request_file(self) -> Path:
        """Whoever makes it asks for a checkpoint now; the run takes it away once there is one."""
        return self.path / "save-now"

    @property
    def stop_file(self) -> Path:
        """Whoever makes it asks the run to save and leave; its controller takes it away when it has left."""
        return self.path / "stop-now"

    @property
    def logs(self) -> Path:
        """A directory an attempt, a file a rank."""
        return self.path / "logs"

    @property
    def typed(self) -> str:
        """The path as a person can type it."""
        return shlex.quote(str(self.path))

    @property
    def saved_step(self) -> int:
        """The step of the newest committed checkpoint, whose content nobody has looked at; 0 where there is none."""
        return next((step for name in self.checkpoints.names() if (step := step_of_name(name))), 0)

    @property
    def has_trained(self) -> bool:
        """Whether a step was ever taken here: from then on it is one run, of one config and one corpus."""
        return self.metrics_file.exists() or bool(self.checkpoints.names())

    def config(self) -> TrainingConfig:
        """The config that every rank of the run reads; where the ranks are placed is not its matter."""
        try:
            sections = upgrade(read_yaml(self.config_file))
            sections.pop("cluster", None)
            return TrainingConfig.model_validate_json(json.dumps(sections), strict=True)
        except (AttributeError, TypeError, ValidationError) as error:
            raise InputError(f"{self.config_file}: {_one_line(error)}; wants the config that manta wrote there") from None

    def manifest(self) -> dict[str, Any]:
        """What the run was begun with."""
        try:
            return json.loads(_read(self.manifest_file))
        except ValueError as error:
            raise InputError(f"{self.manifest_file}: {_one_line(error)}; wants the manifest that manta wrote there") from None

    def differs_in_model(self, model: ModelConfig) -> list[str]:
        """What weights trained or imported here were trained as, and this model is not; shapes aside, which tell by themselves."""
        file = self.path / "model.yaml"
        there = ModelConfig.model_validate(upgrade(read_yaml(file), "model")) if file.exists() else self.config().model
        before, now = _mathematics(there), _mathematics(model)
        return [f"model.{key} {before[key]} -> {now[key]}" for key in now if now[key] != before[key]]

    def prepared(self) -> PreparedData:
        """The corpus and tokenizer that the run reads."""
        prepared = PreparedData.from_json(self.manifest()["corpus"])
        return replace(prepared, tokenizer=self.tokenizer_file) if self.tokenizer_file.exists() else prepared

    @property
    def code(self) -> Path:
        """Where a model of the user's own is looked for, beside installed packages: where the run was begun, or if that is gone, here."""
        begun = self.manifest().get("code") if self.manifest_file.exists() else None
        return Path(begun) if begun and Path(begun).is_dir() else Path.cwd()

    @contextmanager
    def claim(self) -> Generator[None]:
        """Makes the directory, and holds it against a second run. The claim ends with this process, however it ends.

        Raises InputError where it can not be made, or another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.lock_file)
            lock.acquire(timeout=1)  # a moment of patience: `manta status` holds it for an instant
        except OSError as error:
            if isinstance(error, Timeout):
                remedy = f"wait for it or stop it first: manta status {self.typed}"
                raise InputError(f"{self.path}: another manta is running it; {remedy}") from None
            raise InputError(
                f"run.dir: got {self.path} ({error.strerror}), wants a directory that can be written; choose another"
            ) from None
        try:
            yield
        finally:
            lock.release()

    @property
    def is_claimed(self) -> bool:
        """Whether some process holds the run. Reading is enough to ask: it may be another user's."""
        if not self.lock_file.exists():
            return False
        with self.lock_file.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def _mathematics(model: ModelConfig) -> dict[str, object]:
    """Of a model section what decides which function its weights are."""
    keys = ("family", "heads", "rope_theta", "norm_epsilon", "qk_norm", "logit_soft_cap", "sliding_window")
    of_experts = ("top_k", "score", "normalize", "scale", "shared")
    experts: dict[str, object] = {f"experts.{key}": getattr(model.experts, key, None) for key in of_experts}
    return experts | {key: getattr(model, key) for key in keys} | {"kv_heads": model.kv, "head_width": model.each_head}


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return " ".join(str(error).split())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, wants the file of a run directory; make one with `manta train FILE`") from None
