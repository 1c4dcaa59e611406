"""Everything that is checked before a run starts. Nothing is written to the run directory yet."""

from collections.abc import Mapping
from dataclasses import dataclass

from manta.cluster.machine import default_ranks, gpus
from manta.cluster.ray.runtime import LocalRay, Ray
from manta.data.errors import InputError
from manta.data.live.live_sources import with_absolute_paths
from manta.data.shards.manifest import PreparedData
from manta.data.storage.store import open_store
from manta.launch.config import RunConfig
from manta.launch.run.corpus import open_corpus
from manta.launch.run.initial_weights import check_initial_weights, find_initial_weights
from manta.launch.run.resume_check import check_same_data_ranks, check_same_run, is_finished
from manta.trainer.dist.layout import Layout, largest_layout, layouts, shrunk_layouts
from manta.trainer.run_directory import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
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
    corpus = open_corpus(run_dir, config)
    if initial_weights is not None:
        check_initial_weights(initial_weights, run_dir, config, corpus)
        recorded |= {"start_from": initial_weights}
    return RunPlan(
        run_dir=run_dir,
        config=config,
        prepared=corpus.prepared,
        layout=layout,
        layouts=possible,
        fallback_layouts=fallbacks,
        ranks_per_node=per_node,
        recorded=recorded,
    )


def check_writable(run_dir: RunDirectory, config: RunConfig) -> None:
    """Raises InputError if the run or its checkpoints cannot be written. Checked before a corpus is prepared, which takes a long time."""
    open_store(run_dir.path).check_writable("run.dir")
    if config.checkpoint.directory is not None:
        open_store(config.checkpoint.directory).check_writable("checkpoint.directory")


def local_ranks(config: RunConfig) -> int:
    """Return the number of ranks on this machine. Raises InputError if it has too few GPUs."""
    if config.precision == "fp8" and gpus() == 0:
        raise InputError("precision: expected another one on a machine without GPUs, got fp8. Use bf16.")
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
