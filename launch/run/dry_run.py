"""`--dry-run`: what a command would run, by the config and what exists already. Starts and writes nothing."""

from collections.abc import Iterator

from manta.data.prepare.prepare import find_prepared
from manta.launch.config import RunConfig
from manta.launch.run.preflight import check_writable, find_initial_weights
from manta.launch.run.resume_check import check_same_run, is_finished
from manta.launch.run.start import summary
from manta.launch.terminal import count_text
from manta.trainer.dist.layout import largest_layout, layouts
from manta.trainer.run_directory import RunDirectory

USUAL = (1, 2, 4, 8)  # GPUs of a node


def describe(config: RunConfig, ranks_per_node: int | None, *, sees_files: bool) -> Iterator[str]:
    """Yield lines about the run, its corpus, nodes, ranks and batches. Raises InputError if it could not start.

    ranks_per_node: None if only the nodes know it. sees_files: whether the run reads its files through this machine.
    """
    if sees_files:
        yield from _files(config)
    else:
        yield f"run: {config.run.dir}"
    nodes = config.cluster.max_nodes
    yield f"nodes: {config.cluster.nodes}, {'one rank per GPU' if ranks_per_node is None else count_text(ranks_per_node, 'rank')} on each"
    if ranks_per_node is not None:
        ranks = nodes * ranks_per_node
        yield from summary(config, largest_layout(config.train, config.parallel, ranks), ranks)
    else:
        least = min(layouts(config.train, config.parallel), default=1)
        for gpus in USUAL:
            if nodes * gpus >= least:
                layout = largest_layout(config.train, config.parallel, nodes * gpus)
                yield from (f"with {count_text(gpus, 'GPU')} on each: {line}" for line in summary(config, layout, nodes * gpus))
    if variables := config.cluster.environment:
        yield "environment of the ranks: " + " ".join(f"{name}={value}" for name, value in variables.items())


def _files(config: RunConfig) -> Iterator[str]:
    run_dir = RunDirectory(config.run.dir.absolute())
    check_writable(run_dir, config)
    check_same_run(run_dir, config)
    weights, step = find_initial_weights(run_dir, config), run_dir.saved_step()
    start = f"resumes from step {step} of {config.train.steps}" if step else f"new, {count_text(config.train.steps, 'step')}"
    done = f"already done: step {step}; raise train.steps to continue"
    yield f"run: {run_dir.path}: {done if is_finished(run_dir, config) else start}" + (
        f", from the weights of {weights}" if weights else ""
    )
    if config.data.live:
        yield "corpus: none, text is tokenized while it is read (data.live)"
        return
    prepared = run_dir.prepared() if run_dir.has_trained else find_prepared(config.data, config.tokenizer)
    yield f"corpus: {', '.join(prepared.corpora) if prepared else f'to be prepared in {config.data.directory}'}"
