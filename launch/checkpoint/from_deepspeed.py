"""`manta checkpoint convert`: make a run that continues from a plain DeepSpeed checkpoint."""

from pathlib import Path

from manta.data.errors import InputError, cut
from manta.launch.config import load
from manta.launch.run.preflight import check_own_model, check_writable, open_corpus
from manta.launch.run.start import write_run_directory
from manta.launch.terminal import notify
from manta.trainer.checkpoint.manifest import name_of_step
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.config.identity import identity_of
from manta.trainer.convert.deepspeed.load import load_deepspeed, other_content
from manta.trainer.convert.deepspeed.rename import NAMES, differences, logical_state, progress
from manta.trainer.run_directory import RunDirectory


def convert(source: Path, file: Path, overrides: list[str], names: str | None) -> str:
    """Make the config's run directory with a checkpoint, and return the checkpoint's path.

    Raises InputError, and writes nothing, if the source is not DeepSpeed's or of another model, or if the run has trained already.
    """
    config = load(file, overrides)
    if names not in {None, *NAMES}:
        raise InputError(f"--names: expected {' or '.join(NAMES)}, got {names!r}. Omit it to detect the names.")
    run_directory = RunDirectory(config.run.dir.absolute())
    check_writable(run_directory, config)
    backend = run_directory.checkpoints_in(config.checkpoint.directory)
    if run_directory.has_trained or backend.names():
        raise InputError(f"{run_directory.path}: expected a new directory, got a run that has trained already. Choose another run.dir.")
    if config.data.live:
        raise InputError("data.live: expected false, got true: the position of DeepSpeed's run in its text is not known. Remove it.")
    if config.run.start_from is not None:
        problem = f"expected none, got {config.run.start_from}: a converted run starts from the converted checkpoint"
        raise InputError(f"run.start_from: {problem}. Remove it.")
    saved = load_deepspeed(source)
    if saved.step > config.train.steps:
        raise InputError(f"train.steps: expected at least {saved.step}, the step of {saved.folder}, got {config.train.steps}. Raise it.")
    code = check_own_model(run_directory, config)
    prepared, vocabulary = open_corpus(run_directory, config)
    state = logical_state(saved, config, vocabulary=vocabulary, code=run_directory.code, names=names)
    with other_content(saved.folder):
        settings = differences(saved, config)
    with run_directory.lock():
        write_run_directory(run_directory, config, prepared, code)
        about = {"layout": f"DeepSpeed, ZeRO-{saved.stage}", "ranks": saved.ranks, "config": config.model_dump(mode="json")}
        CheckpointWriter(backend, identity=identity_of(config, prepared), attempt=0).save(state, progress(saved, config), about=about)
    for difference in settings:
        notify(cut(difference))
    return backend.location(name_of_step(saved.step))
