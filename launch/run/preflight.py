"""Everything that is checked before a run starts. Nothing is written to the run directory yet."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from manta.cluster.machine import default_ranks, gpus, ignored_gpu_variables, visible_gpus_problem
from manta.cluster.ray.runtime import LocalRay, Ray
from manta.data.errors import InputError
from manta.data.live.live_samples import open_samples
from manta.data.live.live_sources import prepare_live, with_absolute_paths
from manta.data.prepare.prepare import find_prepared, prepare
from manta.data.sampling.samples import Samples
from manta.data.shards.manifest import PreparedData, is_complete
from manta.data.storage.store import open_store
from manta.data.tokenizer.tokenizer import fingerprint, read_tokenizer, read_vocabulary
from manta.launch.config import RunConfig
from manta.launch.run.resume_check import check_same_data_ranks, check_same_run, is_finished
from manta.launch.terminal import notify
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.config.sections import ValidationSet
from manta.trainer.dist.layout import Layout, largest_layout, layouts, shrunk_layouts
from manta.trainer.run_directory import RunDirectory, resolve_start_from, tokenizer_beside


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Everything that is known about a run before it starts."""

    run_dir: RunDirectory
    config: RunConfig
    prepared: PreparedData
    layout: Layout
    """The layout if all nodes of the config are available."""
    layouts: Mapping[int, Layout]
    """A layout for each number of ranks that the run can start with."""
    fallback_layouts: Mapping[int, Layout]
    """Layouts with smaller tensor, sequence and expert sizes, to continue on if too few ranks are left."""
    ranks_per_node: int | None
    """None: one per GPU of each node."""
    recorded: Mapping[str, str]
    """What the manifest of a new run records in addition."""


def preflight(config: RunConfig, ray: Ray) -> RunPlan | None:
    """Return the plan of a run, or None if the run is finished. Raises InputError if it cannot start or resume."""
    if config.data.live:
        config = config.model_copy(update={"data": with_absolute_paths(config.data)})
    run_dir = RunDirectory(config.run.dir.absolute())
    run_dir.check()
    if run_dir.has_trained:  # else they are of an older run
        config = config.skip_also(run_dir.rolled_back())
    check_writable(run_dir, config)
    per_node = local_ranks(config) if isinstance(ray, LocalRay) else config.cluster.ranks_per_node
    possible, fallbacks = layouts(config.train, config.parallel), shrunk_layouts(config.train, config.parallel)
    # Until nodes have reported their GPUs, plan for the largest number of ranks that the run can use.
    ranks = max(possible, default=1) if per_node is None else config.cluster.max_nodes * per_node
    layout = largest_layout(config.train, config.parallel, ranks)
    check_same_run(run_dir, config)
    initial_weights = find_initial_weights(run_dir, config)
    if is_finished(run_dir, config):
        return None
    if config.data.live:
        check_same_data_ranks(run_dir, layout)
        possible, fallbacks = {layout.ranks: layout}, {}
    recorded = check_own_model(run_dir, config)
    if initial_weights is not None:
        _check_shapes(initial_weights, run_dir, config)
    prepared, vocabulary = open_corpus(run_dir, config)
    if initial_weights is not None:
        _check_initial_weights(initial_weights, run_dir, config, prepared, vocabulary)
        recorded |= {"start_from": initial_weights}
    return RunPlan(run_dir, config, prepared, layout, possible, fallbacks, per_node, recorded)


def check_writable(run_dir: RunDirectory, config: RunConfig) -> None:
    """Raises InputError if the run or its checkpoints cannot be written. Checked before a corpus is prepared, which takes a long time."""
    open_store(run_dir.path).check_writable("run.dir")
    if config.checkpoint.directory is not None:
        open_store(config.checkpoint.directory).check_writable("checkpoint.directory")


def local_ranks(config: RunConfig) -> int:
    """Return the number of ranks on this machine. Raises InputError if it has too few GPUs."""
    if config.precision == "fp8" and gpus() == 0:
        raise InputError("precision: expected another one on a machine without GPUs, got fp8. Use bf16.")
    if problem := visible_gpus_problem():
        raise InputError(problem)
    for ignored in ignored_gpu_variables():
        notify(ignored)
    requested = config.cluster.ranks_per_node
    if requested is None:
        return default_ranks()
    if 0 < gpus() < requested:
        raise InputError(f"cluster.ranks_per_node: expected at most one per GPU ({gpus()}), got {requested}. Lower or omit it.")
    return requested


def check_own_model(run_dir: RunDirectory, config: RunConfig) -> dict[str, str]:
    """Import the user's own model class. Return its directory, which the manifest records. Raises InputError if the import fails."""
    if ":" not in config.model.family:
        return {}
    from manta.trainer.model.build import load_class  # imports torch: 1.5 s

    load_class(config.model.family, run_dir.code)
    return {"code": str(run_dir.code)}


def open_corpus(run_dir: RunDirectory, config: RunConfig) -> tuple[PreparedData, int]:
    """Return the corpus that the run reads, checked, and the size of its tokenizer's vocabulary.

    A run that has trained keeps its corpus, even if the sources are gone. Otherwise, the corpus is found or prepared. With data.live,
    the sources themselves are read, so they must be there, unchanged.

    Raises InputError if the corpus is damaged, too small, or another one than the run has trained on.
    """
    used = run_dir.prepared() if run_dir.has_trained else None
    if used is not None and is_complete(used, config.data.cache):
        prepared = prepare_live(used.tokenizer, config.data, config.tokenizer) if config.data.live else used
    else:
        prepared = find_prepared(config.data, config.tokenizer) or prepare(config.data, config.tokenizer)
    if used is not None and used.fingerprint != prepared.fingerprint:
        remedy = "Restore the corpus that the run was started with, or use another run.dir."
        raise InputError(f"{run_dir.path}: corpus fingerprint: expected {used.fingerprint}, got {prepared.fingerprint}. {remedy}")
    used_sets = {} if used is None else {one: used.sets[one.name] for one in run_dir.config().evaluate.sets if one.name in used.sets}
    sets = prepare_sets(config, prepared, used_sets)
    samples = open_samples(prepared, config.data, config.tokenizer, seed=config.run.seed)  # raises InputError if a shard is damaged
    if isinstance(samples, Samples):
        rolled_back = sum(end - first for first, end in run_dir.rolled_back()) if used is not None else 0  # they count for no epoch
        samples.sampler.check_epochs(config.timeline().first_sample(config.train.steps) - rolled_back)
        if (batch := max(config.train.batches)) > (per_epoch := samples.train_windows):
            notify(f"train.global_batch: an epoch has only {per_epoch} samples: a step of {batch} reads samples more than once")
    if not samples.validation_windows and config.data.validation:
        notify("data.validation: too few documents to hold one out: the run measures no validation loss")
    config.model.embedding_rows(samples.tokenizer_vocabulary)  # raises InputError if the embedding is too small
    return prepared.model_copy(update={"sets": sets}), samples.tokenizer_vocabulary


def prepare_all(config: RunConfig) -> list[str]:
    """Prepare the corpora of a run and of its validation sets. Return their directories or URLs."""
    prepared = prepare(config.data, config.tokenizer)
    return [corpus for one in (prepared, *prepare_sets(config, prepared, {}).values()) for corpus in one.corpora]


def prepare_sets(config: RunConfig, prepared: PreparedData, used: Mapping[ValidationSet, PreparedData]) -> dict[str, PreparedData]:
    """Return the validation sets, found or prepared. Those that the run has `used` stay as they are, even if their files are gone.

    prepared: the run's corpus. Raises InputError if a set has too little text for a sample.
    """
    tokens, sets = config.tokenizer.model_copy(update={"file": prepared.tokenizer}), dict[str, PreparedData]()
    for one in config.evaluate.sets:
        data, found = config.validation_set(one), used.get(one)
        if found is None or not is_complete(found, data.cache):
            found = find_prepared(data, tokens) or prepare(data, tokens)
        sets[one.name] = found
    return sets


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
    checkpoints.check_readable(name or names[0])
    checkpoint = checkpoints.location(name or names[0])
    source = RunDirectory(Path(checkpoint).parent.parent)
    is_known = source.config_file.exists() or (source.path / "model.yaml").exists()  # else the checkpoint was copied out of its run
    if is_known and (differences := source.model_differences(config.model)):
        notify(f"run.start_from: the weights were trained with another model section: {'; '.join(differences)}")
    return checkpoint


def _check_shapes(checkpoint: str, run_dir: RunDirectory, config: RunConfig, vocabulary: int | None = None) -> None:
    """Raises InputError if the weights' shapes are not this model's: else ranks would find out. vocabulary: None if it is not known yet."""
    from manta.trainer.pretrained.load import start_difference  # imports torch: 1.5 s

    try:
        difference = start_difference(
            checkpoint,
            config.model,
            vocabulary=config.model.vocabulary or 1 if vocabulary is None else vocabulary,
            sequence_length=config.data.sequence_length,
            code=run_dir.code,
            match_tokens=config.run.match_tokens or vocabulary is None,
        )
    except CheckpointError as error:
        raise InputError(f"run.start_from: {error}") from None
    if difference:
        remedy = "Set model to the model that was trained, or name other weights."
        raise InputError(f"run.start_from: {checkpoint}: {difference}. {remedy}")


def _check_initial_weights(checkpoint: str, run_dir: RunDirectory, config: RunConfig, prepared: PreparedData, vocabulary: int) -> None:
    """Raises InputError if the weights do not fit.

    Weights of another tokenizer are usually a mistake, and worse than random ones. Some users want them, so they are only reported.
    """
    _check_shapes(checkpoint, run_dir, config, vocabulary)
    file = RunDirectory(Path(checkpoint).parent.parent).tokenizer_file
    if config.run.match_tokens:
        source, own = read_vocabulary(tokenizer_beside(resolve_start_from(checkpoint)[0])), read_vocabulary(prepared.tokenizer)
        shared = len(source.keys() & own.keys())
        notify(f"run.match_tokens: {shared:,} of {len(own):,} tokens have a row in the weights, {len(own) - shared:,} are initialized")
    elif not file.exists():
        notify(f"run.start_from: cannot compare tokenizers: there is no {file}")
    elif fingerprint(read_tokenizer(file)) != fingerprint(read_tokenizer(prepared.tokenizer)):
        remedy = f"To use theirs, set tokenizer.file={file}; to match rows by token, set run.match_tokens=true."
        notify(f"run.start_from: the weights were trained with another tokenizer. {remedy}")
