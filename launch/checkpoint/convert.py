"""`manta checkpoint convert`: what plain DeepSpeed saved becomes a run that goes on from there."""

import shlex
from pathlib import Path

from manta.data.errors import InputError
from manta.data.live.live_samples import open_samples
from manta.launch.config import RunConfig, load
from manta.launch.run.display import say
from manta.launch.run.train import check_own_model, check_places, corpus, lay_out
from manta.trainer.checkpoint.identity import identity_of
from manta.trainer.checkpoint.manifest import name_of_step
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.convert.deepspeed.load import load_deepspeed
from manta.trainer.convert.deepspeed.rename import Names, differences, logical_state, progress
from manta.trainer.run_directory import RunDirectory

NAMES: dict[str, Names] = {"manta": "manta", "huggingface": "huggingface"}


def convert(source: Path, file: Path, overrides: list[str], names: str | None) -> str:
    """Makes the run directory of this config, with a checkpoint in it, whose path it gives.

    Raises InputError where there is nothing of DeepSpeed's, or of another model, or the run has trained already: nothing is written then.
    """
    config = load(file, overrides)
    if names is not None and names not in NAMES:
        raise InputError(f"--names: got {names!r}, wants {' or '.join(NAMES)}; leave it out to have the files tell")
    home = RunDirectory(config.run.dir.absolute())
    check_places(home, config)
    where = home.checkpoints_in(config.checkpoint.directory)
    if home.has_trained or where.names():
        raise InputError(f"{home.path}: holds a run that has trained already, wants a new directory; choose another run.dir")
    _refuse(config)
    saved = load_deepspeed(source)
    if saved.step > config.train.steps:
        raise InputError(f"train.steps: got {config.train.steps}, and {saved.folder} is of step {saved.step}; raise it")
    code = check_own_model(home, config)
    prepared = corpus(home, config)
    vocabulary = open_samples(prepared, config.data, config.tokenizer, seed=config.run.seed).tokenizer_vocabulary
    state = logical_state(saved, config, vocabulary=vocabulary, code=home.code, names=NAMES[names] if names else None)
    with home.lock():
        lay_out(home, config, prepared, code)
        told = {"layout": f"DeepSpeed, ZeRO-{saved.stage}", "ranks": saved.ranks, "config": config.model_dump(mode="json")}
        CheckpointWriter(where, identity=identity_of(config, prepared), attempt=0).save(state, progress(saved, config), about=told)
    for difference in differences(saved, config):
        say(difference)
    return where.location(name_of_step(saved.step))


def next_command(file: Path, overrides: list[str]) -> str:
    """What goes on from there."""
    return shlex.join(["manta", "train", str(file), *overrides])


def _refuse(config: RunConfig) -> None:
    """Raises InputError where the config asks for what a converted run can not have."""
    if config.data.live:
        raise InputError("data.live: got true, and where DeepSpeed's run stood in its text is not known; leave it out")
    if config.run.start_from is not None:
        raise InputError(f"run.start_from: got {config.run.start_from}, and a converted run begins with what was converted; leave it out")
