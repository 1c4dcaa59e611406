"""The weights that a new run starts from: checked before the run starts."""

import shlex
from pathlib import Path

from manta.data.errors import InputError
from manta.data.tokenizer.tokenizer import fingerprint, read_tokenizer, read_vocabulary
from manta.launch.config import RunConfig
from manta.launch.messages import notify
from manta.launch.run.corpus import RunCorpus
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.run_directory import RunDirectory, resolve_start_from, tokenizer_beside


def find_initial_weights(run_dir: RunDirectory, config: RunConfig) -> str | None:
    """Return the checkpoint that run.start_from refers to; None if it is omitted, or if the run has trained already.

    The run's manifest records it, so that every attempt starts from the same one, even if the source run writes newer checkpoints.
    Raises InputError if there is no checkpoint.
    """
    start_from = config.run.start_from
    if start_from is None or run_dir.has_trained:
        return None
    checkpoints, name = resolve_start_from(start_from)
    names = checkpoints.names()
    if not names or (name or names[0]) not in names:
        is_transformers = (Path(start_from) / "config.json").exists()
        remedy = f"Import it first: manta import {shlex.quote(start_from)}" if is_transformers else "Name another one, or omit it."
        expected = "a run directory, an imported model or checkpoints/step-..."
        raise InputError(f"run.start_from: expected {expected}, got {start_from}, which has no checkpoint. {remedy}")
    checkpoint = checkpoints.location(name or names[0])
    source = _run_of(checkpoint)
    is_known = source.config_file.exists() or (source.path / "model.yaml").exists()  # else the checkpoint was copied out of its run
    if is_known and (differences := source.model_differences(config.model)):
        notify(f"run.start_from: the weights were trained with another model section: {'; '.join(differences)}")
    return checkpoint


def check_initial_weights(checkpoint: str, run_dir: RunDirectory, config: RunConfig, corpus: RunCorpus) -> None:
    """Report weights of another tokenizer. Raises InputError if their shapes are not this model's: else ranks would find out."""
    from manta.trainer.pretrained.load import start_difference  # imports torch: 1.5 s

    try:
        difference = start_difference(
            checkpoint,
            config.model,
            vocabulary=corpus.tokenizer_vocabulary,
            sequence_length=config.data.sequence_length,
            code=run_dir.code,
            match_tokens=config.run.match_tokens,
        )
    except CheckpointError as error:
        raise InputError(f"run.start_from: {error}") from None
    if difference:
        remedy = "Set model to the model that was trained, or name other weights."
        raise InputError(f"run.start_from: {checkpoint}: {difference}. {remedy}")
    _report_tokenizer(checkpoint, config, corpus.prepared.tokenizer)


def _report_tokenizer(checkpoint: str, config: RunConfig, tokenizer: Path) -> None:
    """Weights of another tokenizer are usually a mistake, and worse than random ones. Some users want them, so they are only reported."""
    if config.run.match_tokens:
        source, own = read_vocabulary(tokenizer_beside(resolve_start_from(checkpoint)[0])), read_vocabulary(tokenizer)
        shared = len(source.keys() & own.keys())
        notify(f"run.match_tokens: {shared:,} of {len(own):,} tokens have a row in the weights, {len(own) - shared:,} are initialized")
        return
    file = _run_of(checkpoint).tokenizer_file
    if not file.exists():
        notify(f"run.start_from: cannot compare tokenizers: there is no {file}")
    elif fingerprint(read_tokenizer(file)) != fingerprint(read_tokenizer(tokenizer)):
        remedy = f"To use theirs, set tokenizer.file={file}; to match rows by token, set run.match_tokens=true."
        notify(f"run.start_from: the weights were trained with another tokenizer. {remedy}")


def _run_of(checkpoint: str) -> RunDirectory:
    return RunDirectory(Path(checkpoint).parent.parent)
