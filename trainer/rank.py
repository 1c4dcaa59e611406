"""One rank of a run, from its run directory to its exit code."""

import logging
import signal
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from manta.cluster.line_file import LineFile
from manta.cluster.protocol import ExitCode, HeartbeatWriter
from manta.data.errors import InputError
from manta.data.live.live_samples import Cursor, LiveSamples, check_data_ranks, open_samples
from manta.data.sampling.samples import Samples
from manta.data.shards.manifest import PreparedData
from manta.data.tokenizer.tokenizer import read_vocabulary
from manta.trainer.checkpoint import catalog, token_rows
from manta.trainer.checkpoint.agreement import on_first_rank
from manta.trainer.checkpoint.backend import CheckpointBackend
from manta.trainer.checkpoint.engine_state import finish_restore, load_weights, logical_shapes, refresh_weights, restore
from manta.trainer.checkpoint.errors import CheckpointError, LeftUnsavedError, SaveError
from manta.trainer.checkpoint.manifest import Checkpoint, Progress
from manta.trainer.checkpoint.retention import Retention
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.config.identity import identity_of
from manta.trainer.config.sections import ValidationSet
from manta.trainer.config.supported import supports_compile
from manta.trainer.config.training import TrainingConfig
from manta.trainer.dist.layout import layout_from_environment
from manta.trainer.dist.world import Mesh, World
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.guard.response import SpikeGuard
from manta.trainer.hardware import require_compiler
from manta.trainer.loop import Loop
from manta.trainer.model.build import build_model
from manta.trainer.model.transformer import Transformer
from manta.trainer.parallel.fp8 import require_fp8_gpu
from manta.trainer.run_directory import RunDirectory, resolve_start_from, tokenizer_beside
from manta.trainer.signals import StopRequest

log = logging.getLogger(__name__)


def run(directory: Path, heartbeat: HeartbeatWriter, stop: StopRequest) -> ExitCode:
    """Train until the last step or a stop request. Errors are raised."""
    run_dir, world = RunDirectory(directory.absolute()), World.from_environment()
    # A supervisor holds the run's lock. Without a supervisor, rank 0 takes it.
    with nullcontext() if heartbeat.is_supervised or world.rank > 0 else run_dir.lock():
        return train(run_dir, world, heartbeat, stop)


def train(run_dir: RunDirectory, world: World, heartbeat: HeartbeatWriter, stop: StopRequest) -> ExitCode:
    heartbeat("load", 0)
    config, corpus = run_dir.config(), run_dir.prepared()
    layout = layout_from_environment(config.train, config.parallel, world.size)
    if config.precision == "fp8":
        require_fp8_gpu(world.device)
    world.join()
    config = config.skip_also(on_first_rank(run_dir.rolled_back))  # a shared disk may show other ranks an older file
    log.info("joined %d ranks on %s", world.size, world.device)
    mesh = world.mesh(layout)
    reading = {"seed": config.run.seed, "held_out": config.evaluate.samples, "rank": mesh.data_rank, "ranks": layout.data}
    samples = open_samples(corpus, config.data, config.tokenizer, **reading)

    sets = {one.name: open_validation_set(config, one, corpus) for one in config.evaluate.sets}

    length = config.data.sequence_length
    model = build_model(config.model, vocabulary=samples.tokenizer_vocabulary, sequence_length=length, code=run_dir.code)
    model.initialize(config.run.seed)
    flops_per_token = {length: model.flops_per_token(length) for length in {stage.sequence_length for stage in config.timeline().stages}}
    engine = build_engine(model, config, mesh, world.device)
    checkpoints = run_dir.open_checkpoints()
    identity = identity_of(config, corpus)
    saver = open_saver(checkpoints, config, identity, world)
    heartbeat("restore", 0)
    progress = resume(engine, checkpoints, identity, verify=config.checkpoint.verify)
    if progress is None and config.run.start_from is not None:
        start_from = run_dir.manifest().start_from or config.run.start_from
        load_initial_weights(engine, start_from, corpus.tokenizer if config.run.match_tokens else None)
    if isinstance(samples, LiveSamples):
        resume_live_samples(samples, progress, mesh)

    metrics = LineFile(run_dir.metrics_file) if world.rank == 0 else None
    window = (progress.window if progress else None) or ()
    guard = SpikeGuard(config.guard, samples, engine, run_dir.spikes_file, heartbeat, attempt=world.attempt, window=window)
    loop = Loop(config, world, samples, engine, run_dir, heartbeat, stop, flops_per_token, saver, guard, metrics, sets)
    try:
        step = loop.run(progress.step if progress else 0)
    except SaveError as error:  # raised on all ranks, while the signal may have reached only one of them
        requests = torch.tensor(float(stop.is_made), device=world.device)
        dist.all_reduce(requests)
        if not requests.item():
            raise
        raise LeftUnsavedError(f"stop requested: {error}") from error
    finally:
        if metrics:
            metrics.close()
    dist.destroy_process_group()
    if metrics and (problem := metrics.problem()):
        log.error("metrics are lost: %s", problem)
        if step == config.train.steps:
            raise SaveError(problem)
    if step == config.train.steps:
        return ExitCode.DONE
    return ExitCode.INTERRUPTED if stop.signal is signal.SIGINT else ExitCode.SAVED


def open_validation_set(config: TrainingConfig, one: ValidationSet, corpus: PreparedData) -> Samples:
    """Its samples are the same for every run, of any seed."""
    prepared = corpus.sets[one.name].model_copy(update={"tokenizer": corpus.tokenizer})
    return Samples(prepared, config.validation_set(one), config.tokenizer, seed=0)


def build_engine(model: Transformer, config: TrainingConfig, mesh: Mesh, device: torch.device) -> Engine:
    parameters = sum(parameter.numel() for parameter in model.parameters())  # before ZeRO-3 partitions them
    checkpointing, compiled = config.train.activation_checkpointing, should_compile(config, device)
    engine = Engine(
        model, mesh=mesh, optimizer=config.optimizer, precision=config.precision, checkpointing=checkpointing, compile_blocks=compiled
    )
    log.info("built %s parameters in %s: %s", f"{parameters:,}", config.precision, mesh.layout)
    return engine


def should_compile(config: TrainingConfig, device: torch.device) -> bool:
    """Return train.compile. If it is omitted: on a GPU, if the layout supports it and a compiler is installed."""
    if config.train.compile is not None:
        return config.train.compile
    if device.type != "cuda" or not supports_compile(config.parallel):
        return False
    try:
        require_compiler(device.type)
    except InputError as error:
        log.warning("blocks are not compiled, so training is slower: %s", error)
        return False
    return True


def open_saver(checkpoints: CheckpointBackend, config: TrainingConfig, identity: dict[str, str], world: World) -> CheckpointWriter:
    """Return the checkpoint writer of this attempt; earlier attempts can write no more."""
    settings = config.checkpoint
    retention = Retention(newest=settings.keep, best=settings.keep_best, every=settings.keep_every)
    saver = CheckpointWriter(checkpoints, identity=identity, attempt=world.attempt, retention=retention, asynchronous=settings.asynchronous)
    saver.set_fence()
    return saver


def resume(engine: Engine, checkpoints: CheckpointBackend, identity: dict[str, str], *, verify: catalog.Verification) -> Progress | None:
    """Load the newest valid checkpoint. Return its progress, or None if there is no checkpoint.

    Raises CheckpointError if all checkpoints are bad, InputError if one belongs to another run.
    """

    def load(checkpoint: Checkpoint) -> None:
        for key, expected in identity.items():
            if (got := checkpoint.identity.get(key)) != expected:
                remedy = "Choose another run.dir, or restore the config that this run was started with."
                raise InputError(f"{checkpoint.location}: {key} fingerprint: expected {expected}, got {got}. {remedy}")
        restore(checkpoints, checkpoint, engine, verify=verify)

    checkpoint = catalog.restore_newest(checkpoints, load)
    if checkpoint is None:
        return None
    finish_restore(checkpoint.progress, engine)
    log.info("resumed from %s", checkpoint.location)
    return checkpoint.progress


def resume_live_samples(samples: LiveSamples, progress: Progress | None, mesh: Mesh) -> None:
    """Continue live samples after the last one that this data rank read. Raises InputError if the number of data ranks has changed."""
    log.info("data.live: the order of samples depends on the number of data ranks: only %d data ranks can resume", mesh.layout.data)
    if progress is not None:
        cursors = progress.cursors or []
        check_data_ranks(cursors, mesh.layout.data)
        samples.seek(Cursor(**cursors[mesh.data_rank]))


def load_initial_weights(engine: Engine, start_from: str, tokenizer: Path | None = None) -> None:
    """Load the weights of another run, or of an import. Raises InputError if there are none, or if they are another model's.

    tokenizer: this run's, if rows of the vocabulary are matched by token.
    """
    checkpoints, name = resolve_start_from(start_from)
    matches = tokenizer and token_rows.shared_ranges(read_vocabulary(tokenizer_beside(checkpoints)), read_vocabulary(tokenizer))

    def load(checkpoint: Checkpoint) -> None:
        matched = checkpoint if matches is None else token_rows.match_rows(checkpoint, matches, logical_shapes(engine))
        load_weights(checkpoints, matched, engine)

    try:
        if name is None:
            checkpoint = catalog.restore_newest(checkpoints, load, set_aside=False)
        else:
            checkpoint = catalog.restore_one(checkpoints, name, load)
    except CheckpointError as error:
        raise InputError(f"run.start_from: {error}") from None
    if checkpoint is None:
        expected = "a run directory, an imported model or a checkpoint"
        raise InputError(f"run.start_from: expected {expected}, got {start_from}, which has no checkpoint. Name another one.")
    refresh_weights(engine)
    log.info("started from the weights of %s", checkpoint.location)
