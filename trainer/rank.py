"""One rank of a run, from its run directory to its exit code."""

import logging
import signal
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from manta.cluster.protocol import ExitCode, HeartbeatWriter
from manta.data.errors import InputError
from manta.data.live.live_samples import Cursor, LiveSamples, check_data_ranks, open_samples
from manta.data.tokenizer.tokenizer import read_vocabulary
from manta.trainer.checkpoint import catalog, vocabulary
from manta.trainer.checkpoint.engine_state import load_masters, logical_shapes, refresh, restore, settle
from manta.trainer.checkpoint.errors import CheckpointError, LeftUnsavedError, SaveError
from manta.trainer.checkpoint.identity import identity_of
from manta.trainer.checkpoint.manifest import Checkpoint, Progress
from manta.trainer.checkpoint.retention import Keep
from manta.trainer.checkpoint.writer import Saver
from manta.trainer.config.supported import compiles
from manta.trainer.config.training import TrainingConfig
from manta.trainer.dist.layout import layout_from_environment
from manta.trainer.dist.world import Mesh, World
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.hardware.compiler import ask_for_compiler
from manta.trainer.hardware.peak_flops import peak_flops
from manta.trainer.loop import Loop
from manta.trainer.model.build import build
from manta.trainer.parallel.fp8 import ask_for_gpu
from manta.trainer.run_directory import RunDirectory, origin_of, tokenizer_of
from manta.trainer.stop_request import Notice

log = logging.getLogger(__name__)


def run(directory: Path, heartbeat: HeartbeatWriter, notice: Notice) -> int:
    """Trains until the last step, or until told to leave. Gives the exit code; what goes wrong is raised."""
    home, world = RunDirectory(directory.absolute()), World.from_environment()
    # A supervisor has claimed the run. Without one its first rank does.
    with nullcontext() if heartbeat.is_supervised or world.rank > 0 else home.claim():
        return train(home, world, heartbeat, notice)


def train(home: RunDirectory, world: World, heartbeat: HeartbeatWriter, notice: Notice) -> int:
    heartbeat("load", 0)
    config = home.config()
    layout = layout_from_environment(config.train, config.parallel, world.size)
    prepared = home.prepared()
    if config.precision == "fp8":
        ask_for_gpu(world.device)
    world.join()
    log.info("joined %d ranks on %s", world.size, world.device)
    mesh = world.mesh(layout)
    reading = {"seed": config.run.seed, "held_out": config.evaluate.samples, "rank": mesh.data_rank, "ranks": layout.data}
    samples = open_samples(prepared, config.data, config.tokenizer, **reading)

    tokens, sequence_length = samples.tokenizer_vocabulary, config.data.sequence_length
    model = build(config.model, vocabulary=tokens, sequence_length=sequence_length, code=home.code)
    model.initialize(config.run.seed)
    costs = {length: model.flops_per_token(length) for length in {phase.sequence_length for phase in config.timeline().stages}}
    parameters = sum(p.numel() for p in model.parameters())
    peak = peak_flops(world.device, torch.float32 if config.precision == "fp32" else torch.bfloat16)
    engine = Engine(
        model,
        mesh=mesh,
        optimizer=config.optimizer,
        precision=config.precision,
        recompute=config.train.activation_checkpointing,
        compile_blocks=_compiles(config, world.device),
    )
    log.info("built %s parameters in %s: %s", f"{parameters:,}", config.precision, layout)
    identity, told = identity_of(config, prepared), config.checkpoint
    saver = Saver(
        home.checkpoints,
        identity=identity,
        attempt=world.attempt,
        keep=Keep(newest=told.keep, best=told.keep_best, every=told.keep_every),
        asynchronous=told.asynchronous,
    )
    saver.fence()
    come = resume(engine, home, identity, verify=told.verify)
    if come is None and config.run.start_from is not None:
        start = home.manifest().get("start_from", config.run.start_from)
        begin_from(engine, start, prepared.tokenizer if config.run.match_tokens else None)
    if isinstance(samples, LiveSamples):
        go_on(samples, come, mesh)

    loop = Loop(
        config=config,
        world=world,
        samples=samples,
        engine=engine,
        home=home,
        heartbeat=heartbeat,
        notice=notice,
        peak=peak,
        flops_per_token=costs,
        saver=saver,
    )
    try:
        step = loop.run(come.step if come else 0)
    except SaveError as error:  # on all ranks: the signal may have met but one of them
        if not _any(world, notice.signal is not None):
            raise
        raise LeftUnsavedError(f"told to leave: {error}") from error
    dist.destroy_process_group()
    if step == config.train.steps:
        return ExitCode.DONE
    return ExitCode.INTERRUPTED if notice.signal is signal.SIGINT else ExitCode.SAVED


def _any(world: World, claim: bool) -> bool:
    """Whether it is so on any rank."""
    told = torch.tensor(float(claim), device=world.device)
    dist.all_reduce(told)
    return told.item() > 0


def _compiles(config: TrainingConfig, device: torch.device) -> bool:
    """As the config says; where it says nothing, on a GPU, under a layout that allows it, with a compiler at hand."""
    if config.train.compile is not None:
        return config.train.compile
    if device.type != "cuda" or not compiles(config.parallel):
        return False
    try:
        ask_for_compiler(device.type)
    except InputError as error:
        log.warning("blocks are not compiled, which costs speed: %s", error)
        return False
    return True


def resume(engine: Engine, home: RunDirectory, identity: dict[str, str], *, verify: catalog.Verify) -> Progress | None:
    """Loads the newest valid checkpoint. Gives how far it has come; None where there is none.

    Raises CheckpointError where all are bad, InputError where it is of another run.
    """
    where = home.checkpoints

    def take(checkpoint: Checkpoint) -> None:
        for key, wanted in identity.items():
            if (got := checkpoint.identity.get(key)) != wanted:
                remedy = "choose another run.dir, or go back to the config that this run was started with"
                raise InputError(f"{checkpoint.at}: {key} fingerprint: got {got}, wants {wanted}; {remedy}")
        restore(where, checkpoint, engine, verify=verify)

    checkpoint = catalog.take_newest(where, take)
    if checkpoint is None:
        return None
    settle(checkpoint.progress, engine)
    log.info("resumed from %s", checkpoint.at)
    return checkpoint.progress


def go_on(samples: LiveSamples, come: Progress | None, mesh: Mesh) -> None:
    """Has live samples go on from where this data rank stood. Raises InputError where more or fewer ranks have read so far."""
    log.info("data.live: what is read depends on the number of data ranks, %d; no other can go on", mesh.layout.data)
    if come is not None:
        cursors = come.cursors or []
        check_data_ranks(cursors, mesh.layout.data)
        samples.seek(Cursor(**cursors[mesh.data_rank]))


def begin_from(engine: Engine, start: str, tokenizer: Path | None = None) -> None:
    """The weights of another run, or of an import. Raises InputError where there are none, or they are those of another model.

    tokenizer: this run's, where rows go by what a token is.
    """
    where, name = origin_of(start)
    alike = None if tokenizer is None else vocabulary.runs(read_vocabulary(tokenizer_of(where)), read_vocabulary(tokenizer))

    def take(checkpoint: Checkpoint) -> None:
        suited = checkpoint if alike is None else vocabulary.matched(checkpoint, alike, logical_shapes(engine))
        load_masters(where, suited, engine)

    try:
        checkpoint = catalog.take_newest(where, take, set_aside=False) if name is None else catalog.take_one(where, name, take)
    except CheckpointError as error:
        raise InputError(f"run.start_from: {error}") from None
    if checkpoint is None:
        raise InputError(f"run.start_from: {start}: got no checkpoint there, wants a run's directory, an imported one, or a checkpoint's")
    refresh(engine)
    log.info("began from the weights of %s", checkpoint.at)
