"""From a config to a supervised run: checked whole, prepared, claimed, then handed to the controller."""

import json
import os
import platform
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from manta.cluster.job import Job
from manta.cluster.nodes.machine import default_ranks, gpus
from manta.cluster.protocol import ExitCode
from manta.cluster.ray.runtime import LocalRay, Ray
from manta.cluster.supervise.controller import Controller
from manta.cluster.supervise.event_log import Event
from manta.data.errors import InputError
from manta.data.live.live_samples import open_samples
from manta.data.live.live_sources import prepare_live, with_absolute_paths
from manta.data.prepare.prepare import find_prepared, prepare
from manta.data.sampling.samples import Samples
from manta.data.shards.manifest import PreparedData, is_complete
from manta.data.storage.atomic import write_atomically
from manta.data.storage.store import open_store
from manta.launch import __version__
from manta.launch.config import RunConfig
from manta.launch.run.detach import detach
from manta.launch.run.display import Display, say
from manta.launch.run.initial_weights import refuse_other_weights, start_of, tell_of_another_tokenizer
from manta.launch.run.resume_check import is_done, refuse_another_run, refuse_other_ranks
from manta.trainer.dist.layout import Layout, largest_layout, layouts, micro_batches_text, shrunk_layouts
from manta.trainer.run_directory import RunDirectory

STACK = ("torch", "deepspeed", "ray", "numpy", "tokenizers")


def train(config: RunConfig, ray: Ray, *, detached: Sequence[str] = ()) -> int:
    """Starts the run, or goes on with it where it was begun. Gives the exit code. Raises InputError before anything is started.

    `detached`: the arguments of the manta that does so in the background, where this one is not to.
    """
    ready = ready_to_train(config, ray)
    if ready is None:
        say(f"{config.run.dir.absolute()}: already done: step {config.train.steps} of {config.train.steps}; raise train.steps to go on")
        return 0
    if detached:
        return detach(ready.home, detached)
    with ready.begun() as controller:
        return follow(controller.run(), Display(ready.home, config.train.steps, config.timeline()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """All that can be known of a run before it begins. `each`: ranks a node, None where the nodes decide. `told`: of its origin."""

    home: RunDirectory
    config: RunConfig
    ray: Ray
    prepared: PreparedData
    layout: Layout
    layouts: dict[int, Layout]
    each: int | None
    told: dict[str, str]

    @contextmanager
    def begun(self) -> Generator[Controller]:
        """Its controller; the run is claimed as long as this lasts."""
        home, config, layout = self.home, self.config, self.layout
        with home.lock():
            lay_out(home, config, self.prepared, self.told)
            self._say()
            shrunk = {} if config.data.live else shrunk_layouts(config.train, config.parallel)
            job = Job(
                program=("-P", "-m", "manta.trainer", str(home.path)),
                environment={name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ},  # else kept from the ranks
                directory=home.path,
                sizes=(layout.ranks,) if config.data.live else tuple(self.layouts),
                fallback_sizes=tuple(shrunk),
                environment_by_size={ranks: one.to_environment() for ranks, one in (self.layouts | shrunk).items()},
                ranks_per_node=self.each,
                packages=(("manta", __version__), *((name, found) for name in STACK if (found := _version(name)) is not None)),
            )
            yield Controller(job, config.cluster, self.ray)

    def _say(self) -> None:
        config, layout, where = self.config, self.layout, self.home.path
        if self.each and (ranks := config.cluster.max_nodes * self.each) > layout.ranks:
            say(f"{ranks - layout.ranks} of {ranks} ranks stand by: {micro_batches_text(config.train)} deals out evenly over {layout.data}")
        if self.each:
            say(f"{where}: {steps_in_words(config, layout)}; {config.precision}, {layout}")
        if config.data.live:
            say(f"{where}: data.live: text is tokenized while it is read; only as many data ranks, {layout.data}, can go on with it")


def ready_to_train(config: RunConfig, ray: Ray) -> Ready | None:
    """None where the run is done already. Raises InputError where it can not begin, or go on."""
    if config.data.live:
        config = config.model_copy(update={"data": with_absolute_paths(config.data)})
    home = RunDirectory(config.run.dir.absolute())
    check_places(home, config)
    each = ranks_per_node(config) if isinstance(ray, LocalRay) else config.cluster.ranks_per_node
    fitting = layouts(config.train, config.parallel)
    ranks = max(fitting, default=1) if each is None else config.cluster.max_nodes * each  # None: nobody knows yet what GPUs there are
    layout = largest_layout(config.train, config.parallel, ranks)
    refuse_another_run(home, config)
    start = start_of(home, config)
    if is_done(home, config):
        return None
    if config.data.live:
        refuse_other_ranks(home, layout)
    code = check_own_model(home, config)
    prepared = corpus(home, config)
    for found in start.values():
        refuse_other_weights(found, home, config, prepared)
        tell_of_another_tokenizer(found, config, prepared)
    return Ready(home=home, config=config, ray=ray, prepared=prepared, layout=layout, layouts=fitting, each=each, told=code | start)


def lay_out(home: RunDirectory, config: RunConfig, prepared: PreparedData, told: dict[str, str]) -> None:
    """Writes what ranks begin with into a claimed directory. told: what the manifest remembers besides of a run that begins."""
    begun = home.manifest() if home.has_trained else manifest(config)
    write_atomically(home.manifest_file, json.dumps(begun | told | {"corpus": prepared.to_json()}, indent=1).encode())
    write_atomically(home.config_file, config.to_yaml().encode())
    write_atomically(home.tokenizer_file, prepared.tokenizer.read_bytes())


def follow(events: Iterator[Event], display: Display) -> int:
    """Shows them all. Gives the exit code that the last one has."""
    code = ExitCode.FAILED
    with display:
        for event in events:
            display.show(event)
            code = event.details.get("exit_code", code)
    return code


def ranks_per_node(config: RunConfig) -> int:
    """On this machine. Raises InputError where it has too few GPUs."""
    if config.precision == "fp8" and gpus() == 0:
        raise InputError("precision: got fp8, which wants GPUs, and this machine has none; use bf16")
    asked = config.cluster.ranks_per_node
    if asked is None:
        return default_ranks()
    if 0 < gpus() < asked:
        raise InputError(f"cluster.ranks_per_node: expected at most one per GPU ({gpus()}), got {asked}. Lower or omit it.")
    return asked


def check_places(home: RunDirectory, config: RunConfig) -> None:
    """Raises InputError where the run, or its checkpoints, could not be written: said before a corpus is prepared, not after."""
    open_store(home.path).check_writable("run.dir")
    if config.checkpoint.directory is not None:
        open_store(config.checkpoint.directory).check_writable("checkpoint.directory")


def steps_in_words(config: RunConfig, layout: Layout) -> str:
    """What is read in a step, and by whom; where that changes, from which step on."""
    each = layout.ranks // layout.data
    groups = ranks_in_words(layout.data) if each == 1 else f"{layout.data} x {ranks_in_words(each)}"
    told: list[str] = []
    for phase in config.timeline().stages:
        sequences = phase.global_batch * (config.data.sequence_length // phase.sequence_length)
        accumulation = layout.accumulation(phase.global_batch)
        since = f"from step {phase.first_step + 1} " if phase.first_step else ""
        told.append(f"{since}accumulation {accumulation} = {sequences} sequences of {phase.sequence_length} tokens a step")
    return f"{groups} x micro batch {layout.micro_batch} x {', '.join(told)}"


def ranks_in_words(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"


def check_own_model(home: RunDirectory, config: RunConfig) -> dict[str, str]:
    """What the manifest remembers of a model of the user's own: where it is looked for. Raises InputError where it can not be had."""
    if ":" not in config.model.family:
        return {}
    from manta.trainer.model.build import load_class  # torch: a second and a half, for those alone who need it

    load_class(config.model.family, home.code)
    return {"code": str(home.code)}


def corpus(home: RunDirectory, config: RunConfig) -> PreparedData:
    """What the run reads: what it was begun with, where that is still there, even if its sources are not; else found or prepared.

    Live, the sources are what it reads: they have to be there, and the same.

    Raises InputError where it is damaged, or other tokens than the run was begun with.
    """
    begun = home.prepared() if home.has_trained else None
    if begun is not None and is_complete(begun, config.data.cache):
        prepared = prepare_live(begun.tokenizer, config.data, config.tokenizer) if config.data.live else begun
    else:
        prepared = find_prepared(config.data, config.tokenizer) or prepare(config.data, config.tokenizer)
    if begun is not None and begun.fingerprint != prepared.fingerprint:
        remedy = "bring back the corpus it was begun with, or choose another run.dir"
        raise InputError(f"{home.path}: corpus fingerprint: got {prepared.fingerprint}, wants {begun.fingerprint}; {remedy}")
    samples = open_samples(prepared, config.data, config.tokenizer, seed=config.run.seed)  # raises where shards are not as written
    if isinstance(samples, Samples):
        check_reading(samples, config)
    config.model.embedding_rows(samples.tokenizer_vocabulary)  # raises InputError if it is too small
    return prepared


def check_reading(samples: Samples, config: RunConfig) -> None:
    """Raises InputError where a source would be read more often than it may, or a step would read a sample twice."""
    samples.sampler.check_epochs(config.timeline().first_sample(config.train.steps))
    each = sum(len(draw.dataset) for draw in samples.sampler.sources)
    if (batch := max(config.train.batches)) > each:
        wants = f"at most the {each} samples of an epoch, that none stands twice in a step"
        raise InputError(f"train.global_batch: got {batch}, wants {wants}; lower it, or give more text")


def manifest(config: RunConfig) -> dict[str, Any]:
    """What the run was begun with: versions, machine, seed. The corpus is added, with where it lies now."""
    return {
        "manta": __version__,
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in STACK},
        "machine": {"node": platform.node(), "system": platform.platform(), "cores": os.cpu_count(), "gpus": gpus()},
        "seed": config.run.seed,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
