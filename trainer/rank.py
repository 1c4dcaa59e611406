"""One rank of a run, from its run directory to its exit code."""

import hashlib
import json
import logging
import signal
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from manta.data import order
from manta.data.errors import InputError
from manta.data.samples import Samples
from manta.trainer.checkpoint import store
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.state import after_load, logical_shapes, logical_state
from manta.trainer.engine import Engine
from manta.trainer.heartbeat import Heartbeat
from manta.trainer.layout import fits
from manta.trainer.loop import Loop, Notice
from manta.trainer.model.gpt import GPT, flops_per_token
from manta.trainer.power import peak_flops
from manta.trainer.rundir import RunDirectory
from manta.trainer.world import World

log = logging.getLogger(__name__)
DONE, LEFT, INTERRUPTED = 0, 75, 130


def run(directory: Path, heartbeat: Heartbeat) -> int:
    """Trains until the last step, or until told to leave. Gives the exit code; what goes wrong is raised."""
    home, world = RunDirectory(directory.absolute()), World.from_environment()
    # A supervisor has claimed the run. Without one its first rank does.
    with nullcontext() if heartbeat.is_heard or world.rank > 0 else home.claim():
        return train(home, world, heartbeat)


def train(home: RunDirectory, world: World, heartbeat: Heartbeat) -> int:
    notice = Notice()
    heartbeat("load", 0)
    config = home.config()
    layout = fits(config.train, world.size)
    prepared = home.prepared()
    samples = Samples(prepared, sequence_length=config.data.sequence_length, seed=config.run.seed)
    world.join()
    log.info("joined %d ranks on %s", world.size, world.device)

    model = GPT(config.model, vocabulary=samples.tokenizer_vocabulary)
    model.initialize(config.run.seed)
    cost = flops_per_token(model, config.data.sequence_length)
    peak = peak_flops(world.device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    engine = Engine(model, layout=layout, optimizer=config.optimizer, precision=config.precision)
    log.info("built %s parameters in %s", f"{sum(p.numel() for p in model.parameters()):,}", config.precision)
    identity = {"corpus": prepared.fingerprint, "config": _digest(config.identity()), "order": str(order.VERSION)}
    step = resume(engine, home, identity)

    loop = Loop(
        config=config,
        world=world,
        samples=samples,
        engine=engine,
        home=home,
        heartbeat=heartbeat,
        notice=notice,
        peak=peak,
        flops_per_token=cost,
        identity=identity,
    )
    step = loop.run(step)
    dist.destroy_process_group()
    if step == config.train.steps:
        return DONE
    return INTERRUPTED if notice.signal is signal.SIGINT else LEFT


def resume(engine: Engine, home: RunDirectory, identity: dict[str, str]) -> int:
    """Loads the newest valid checkpoint, where there is one. Gives the steps it has done.

    Rank 0 reads and hashes it; the others take its word. Raises CheckpointError where all are bad, InputError where it is of another run.
    """
    chosen: list[store.Checkpoint | Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            chosen[0] = found = store.newest(home.checkpoints)
            if found is not None:
                store.set_aside(home.checkpoints, found)
        except CheckpointError as error:
            chosen[0] = error
    dist.broadcast_object_list(chosen, device=torch.device("cpu"))
    checkpoint = chosen[0]
    if isinstance(checkpoint, Exception):
        raise checkpoint
    if checkpoint is None:
        return 0
    for key, wanted in identity.items():
        if (got := checkpoint.identity.get(key)) != wanted:
            remedy = "choose another run.dir, or go back to the config that this run was started with"
            raise InputError(f"{checkpoint.path}: {key} fingerprint: got {got}, wants {wanted}; {remedy}")
    store.load(checkpoint, logical_state(engine), logical_shapes(engine))
    after_load(engine, checkpoint.progress.optimizer_steps)
    log.info("resumed from %s", checkpoint.path)
    return checkpoint.progress.step


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
