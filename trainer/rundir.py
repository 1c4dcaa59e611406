"""A run directory: what lies where. Whoever sees it can say all about the run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from manta.data.errors import InputError
from manta.data.prepare import Prepared
from manta.trainer.config import TrainingConfig


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
    def lock_file(self) -> Path:
        return self.path / "lock"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def config(self) -> TrainingConfig:
        """The config that every rank of the run reads; where the ranks are placed is not its matter."""
        sections = yaml.safe_load(_read(self.config_file))
        sections.pop("cluster", None)
        return TrainingConfig.model_validate_json(json.dumps(sections), strict=True)

    def manifest(self) -> dict[str, Any]:
        return json.loads(_read(self.manifest_file))

    def prepared(self) -> Prepared:
        """The corpus and tokenizer that the run reads."""
        return Prepared.from_json(self.manifest()["corpus"])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, wants the file of a run directory; make one with `manta train FILE`") from None
