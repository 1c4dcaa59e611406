"""Whose weights a new run begins with: looked at, and told of, before anything starts."""

import shlex
from pathlib import Path

from manta.data.errors import InputError
from manta.data.live.live_samples import open_samples
from manta.data.shards.manifest import PreparedData
from manta.data.tokenizer.tokenizer import fingerprint, read_tokenizer, read_vocabulary
from manta.launch.config import RunConfig
from manta.launch.run.display import say
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.run_directory import RunDirectory, resolve_start_from, tokenizer_beside


def start_of(home: RunDirectory, config: RunConfig) -> dict[str, str]:
    """Which checkpoint's weights a new run begins with, for its manifest: the same one on every attempt, however the source goes on.

    Raises InputError where there is none: said before a corpus is prepared, not after.
    """
    start = config.run.start_from
    if start is None or home.has_trained:
        return {}  # of a run that has begun the manifest says it already
    where, named = resolve_start_from(start)
    names = where.names()
    if not names or (named or names[0]) not in names:
        foreign = (Path(start) / "config.json").exists()
        remedy = f"take it in first: manta import {shlex.quote(start)}" if foreign else "name one, or leave it out"
        wants = "a run's directory, an imported one, or checkpoints/step-..."
        raise InputError(f"run.start_from: got {start}, which has no checkpoint, wants {wants}; {remedy}")
    found = where.location(named or names[0])
    origin = RunDirectory(Path(found).parent.parent)
    known = origin.config_file.exists() or (origin.path / "model.yaml").exists()  # else it was copied out of its run
    if known and (differ := origin.model_differences(config.model)):
        say(f"run.start_from: the weights were trained as another model: {'; '.join(differ)}")
    return {"start_from": found}


def refuse_other_weights(found: str, home: RunDirectory, config: RunConfig, prepared: PreparedData) -> None:
    """Raises InputError where the weights are not of this model's shapes: ranks would say so too, once they all stand."""
    from manta.trainer.pretrained.weights import start_difference  # imports torch: 1.5 s

    tokens = open_samples(prepared, config.data, config.tokenizer, seed=config.run.seed).tokenizer_vocabulary
    length, match_tokens = config.data.sequence_length, config.run.match_tokens
    try:
        told = start_difference(found, config.model, vocabulary=tokens, sequence_length=length, code=home.code, match_tokens=match_tokens)
    except CheckpointError as error:
        raise InputError(f"run.start_from: {error}") from None
    if told:
        remedy = "was it another model? Set model to what it was, or name other weights"
        raise InputError(f"run.start_from: {found}: {told}; {remedy}")


def tell_of_another_tokenizer(found: str, config: RunConfig, prepared: PreparedData) -> None:
    """Weights whose tokens mean something else begin worse than none: it is said, and not refused, for some are trained on purpose so."""
    if config.run.match_tokens:
        theirs, ours = read_vocabulary(tokenizer_beside(resolve_start_from(found)[0])), read_vocabulary(prepared.tokenizer)
        both = len(theirs.keys() & ours.keys())
        say(f"run.match_tokens: {both:,} of {len(ours):,} tokens have a row in the weights, {len(ours) - both:,} begin anew")
        return
    file = RunDirectory(Path(found).parent.parent).tokenizer_file
    if not file.exists():
        say(f"run.start_from: whether the weights were trained with this tokenizer is not known: there is no {file}")
    elif fingerprint(read_tokenizer(file)) != fingerprint(read_tokenizer(prepared.tokenizer)):
        remedy = f"to read as they did: tokenizer.file={file}; to take rows by what a token is: run.match_tokens=true"
        say(f"run.start_from: the weights were trained with another tokenizer; {remedy}")
