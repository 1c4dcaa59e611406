"""A run's model, whole, in one process that trains nothing: what generation and export begin with."""

from dataclasses import dataclass
from pathlib import Path

import torch

from manta.data.errors import InputError
from manta.data.tokenizer import Tokenizer
from manta.trainer.checkpoint import store
from manta.trainer.config import TrainingConfig
from manta.trainer.model.gpt import GPT
from manta.trainer.rundir import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    model: GPT  # fp32, in evaluation mode
    tokenizer: Tokenizer
    tokenizer_file: Path
    config: TrainingConfig
    checkpoint: store.Checkpoint


def load_pretrained(home: RunDirectory) -> Pretrained:
    """From the newest valid checkpoint. Raises InputError where there is none, CheckpointError where all are bad."""
    config = home.config()
    checkpoint = store.newest(home.checkpoints)
    if checkpoint is None:
        raise InputError(f"{home.checkpoints}: got no checkpoint, wants one; train first: manta resume {home.typed}")
    file = home.prepared().tokenizer
    tokenizer = Tokenizer(file, end_of_text=config.tokenizer.end_of_text)
    with torch.device("meta"):
        model = GPT(config.model, vocabulary=tokenizer.vocabulary)
    model.load_state_dict(store.load_weights(checkpoint), assign=True)
    return Pretrained(model=model.eval(), tokenizer=tokenizer, tokenizer_file=file, config=config, checkpoint=checkpoint)
