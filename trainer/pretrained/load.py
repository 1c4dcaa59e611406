"""A trained or imported model in one process that does not train: where generation and export start."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from manta.data.config_history import upgrade
from manta.data.errors import InputError
from manta.data.tokenizer.tokenizer import Tokenizer
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.manifest import Checkpoint
from manta.trainer.config.model import ModelConfig
from manta.trainer.config.yaml_file import read_yaml
from manta.trainer.model.build import build_model
from manta.trainer.model.transformer import Transformer
from manta.trainer.pretrained.source import ImportSource, read_source
from manta.trainer.pretrained.weights import fill_weights
from manta.trainer.run_directory import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    run_directory: RunDirectory
    config: ModelConfig
    model: Transformer  # fp32, in evaluation mode
    tokenizer: Tokenizer
    tokenizer_file: Path
    end_of_text: str
    sequence_length: int
    checkpoint: Checkpoint
    source: ImportSource | None  # None for a run

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding that are not padding."""
        return self.config.vocabulary or self.tokenizer.vocabulary


def load_pretrained(run_directory: RunDirectory) -> Pretrained:
    """Load the newest valid checkpoint of a run, or an imported model.

    Raises InputError if there is no checkpoint, CheckpointError if all are damaged, or another model's.
    """
    source = read_source(run_directory.path)
    if source is None:
        run = run_directory.config()
        config, end_of_text, sequence_length = run.model, run.tokenizer.end_of_text, run.data.sequence_length
    else:
        config, end_of_text, sequence_length = _imported_config(run_directory.path), source.end_of_text, source.sequence_length
    newest = catalog.load_newest_weights(run_directory.open_checkpoints())
    if newest is None:
        remedy = f"Run manta resume {run_directory.quoted} first." if source is None else "Import again."
        raise InputError(f"{run_directory.open_checkpoints()}: expected a checkpoint, got none. {remedy}")
    checkpoint, weights = newest
    file = run_directory.tokenizer_file if run_directory.tokenizer_file.exists() else run_directory.prepared().tokenizer
    tokenizer = Tokenizer(file, end_of_text=end_of_text)
    with torch.device("meta"):
        model = build_model(config, vocabulary=tokenizer.vocabulary, sequence_length=sequence_length, code=run_directory.code)
    fill_weights(model, weights, checkpoint.location)
    return Pretrained(
        run_directory=run_directory,
        config=config,
        model=model.eval(),
        tokenizer=tokenizer,
        tokenizer_file=file,
        end_of_text=end_of_text,
        sequence_length=sequence_length,
        checkpoint=checkpoint,
        source=source,
    )


def _imported_config(directory: Path) -> ModelConfig:
    file = directory / "model.yaml"
    try:
        return ModelConfig.model_validate_json(json.dumps(upgrade(read_yaml(file), "model")), strict=True)
    except (InputError, TypeError, ValidationError) as error:
        raise InputError(f"{file}: expected the file that manta import wrote: {' '.join(str(error).split())}. Import again.") from None
