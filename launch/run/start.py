"""Start or resume a run, here or detached: preflight, write its directory, supervise its ranks, show its progress."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path

from manta.cluster.job import Job
from manta.cluster.machine import gpus
from manta.cluster.protocol import ExitCode
from manta.cluster.ray.runtime import Ray
from manta.cluster.supervise.controller import Controller
from manta.cluster.supervise.event_log import Event, read_events
from manta.data.messages import MessageConsole
from manta.data.shards.manifest import PreparedData
from manta.data.storage.atomic import write_atomically
from manta.launch import __version__
from manta.launch.config import RunConfig
from manta.launch.run.display import Display
from manta.launch.run.preflight import RunPlan, preflight
from manta.launch.terminal import count_text, notify
from manta.launch.track.trackers import chosen
from manta.trainer.dist.layout import Layout, micro_batches_text
from manta.trainer.run_directory import RunDirectory

POLL_INTERVAL = 0.1  # seconds
PACKAGES = ("torch", "deepspeed", "ray", "numpy", "tokenizers")


def train(config: RunConfig, ray: Ray, *, write_report: Callable[[Path, int], None], detached: Sequence[str] = ()) -> int:
    """Start the run, or resume it if it was started before. Return the exit code. Raises InputError before anything is written.

    write_report: called with the run directory when the run has ended, while its trackers, which upload the report, wait for it;
    and with the number of texts to generate before, which is 0 unless the run is done.
    detached: the arguments of a manta that runs in the background instead of this process.
    """
    plan = preflight(config, ray)
    if plan is None:
        steps = config.train.steps
        notify(f"{config.run.dir.absolute()}: already done: step {steps} of {steps}; raise train.steps to continue")
        if not detached:
            write_report(config.run.dir, 0)
        return ExitCode.DONE
    if detached:
        return _detach(plan.run_dir, detached)
    with supervise(plan, ray) as controller, closing(controller.run()) as events:
        _print_summary(plan)
        return Display(plan.run_dir, plan.config, plan.fallback_layouts).follow(_with_report(events, plan, write_report))


def _with_report(events: Iterator[Event], plan: RunPlan, write_report: Callable[[Path, int], None]) -> Iterator[Event]:
    """Yield the events; write the report once the last one is shown, and only then let the trackers end."""
    for event in events:
        yield event
        if event.kind == "run-ended":
            is_done = event.details["exit_code"] == ExitCode.DONE  # a stop never waits for texts
            write_report(plan.run_dir.path, plan.config.track.texts if is_done else 0)


@contextmanager
def supervise(plan: RunPlan, ray: Ray) -> Generator[Controller]:
    """Lock the run directory, write what ranks read, and yield the run's controller."""
    run_dir, trackers = plan.run_dir, chosen(plan.config.track)  # raises InputError if a package is missing
    with run_dir.lock():
        write_run_directory(run_dir, plan.config, plan.prepared, plan.recorded)
        all_layouts = {**plan.layouts, **plan.fallback_layouts}
        job = Job(
            program=("-P", "-m", "manta.trainer", str(run_dir.path)),
            environment={},
            directory=run_dir.path,
            sizes=tuple(plan.layouts),
            fallback_sizes=tuple(plan.fallback_layouts),
            environment_by_size={ranks: layout.to_environment() for ranks, layout in all_layouts.items()},
            ranks_per_node=plan.ranks_per_node,
            rank_events=run_dir.spikes_file,
            companion=("-P", "-m", "manta.launch.track", str(run_dir.path)) if trackers else (),
            packages=(("manta", __version__), *((name, version(name)) for name in PACKAGES)),
            files={file: file.read_bytes() for file in (run_dir.config_file, run_dir.manifest_file, run_dir.tokenizer_file)},
        )
        yield Controller(job, plan.config.cluster, ray)


def write_run_directory(run_dir: RunDirectory, config: RunConfig, prepared: PreparedData, recorded: Mapping[str, str]) -> None:
    """Write what ranks read into a locked directory. recorded: what the manifest of a new run records in addition."""
    new = {
        "manta": __version__,
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": {"node": platform.node(), "system": platform.platform(), "cores": os.cpu_count(), "gpus": gpus()},
        "seed": config.run.seed,
    }
    manifest = run_dir.manifest().model_dump(mode="json", exclude_unset=True) if run_dir.has_trained else new
    if not run_dir.has_trained:
        run_dir.spikes_file.unlink(missing_ok=True)  # its samples are those of an older run
    content = {**manifest, **recorded, "corpus": prepared.model_dump(mode="json", exclude_defaults=True)}
    write_atomically(run_dir.manifest_file, json.dumps(content, indent=1).encode())
    write_atomically(run_dir.config_file, config.to_yaml().encode())
    write_atomically(run_dir.tokenizer_file, prepared.tokenizer.read_bytes())


def step_text(config: RunConfig, layout: Layout) -> str:
    """Describe what each step reads, stage by stage, and how the ranks share it."""
    per_group = layout.ranks // layout.data
    groups = count_text(layout.data, "rank") if per_group == 1 else f"{layout.data} x {count_text(per_group, 'rank')}"
    stages: list[str] = []
    for stage in config.timeline().stages:
        sequences = count_text(stage.global_batch * (config.data.sequence_length // stage.sequence_length), "sequence")
        accumulation = layout.accumulation(stage.global_batch)
        start = f"from step {stage.first_step + 1} " if stage.first_step else ""
        stages.append(f"{start}accumulation {accumulation} = {sequences} of {stage.sequence_length} tokens per step")
    return f"{groups} x micro batch {layout.micro_batch} x {', '.join(stages)}"


def summary(config: RunConfig, layout: Layout, ranks: int) -> Iterator[str]:
    """Yield how many of `ranks` ranks are idle and why, what each step reads, and the layout."""
    if ranks > layout.ranks:
        reason = f"{micro_batches_text(config.train)} divides evenly over {count_text(layout.data, 'data rank')}"
        yield f"{ranks - layout.ranks} of {count_text(ranks, 'rank')} will be idle: {reason}"
    yield f"{step_text(config, layout)}; {config.precision}, {layout}"


def _print_summary(plan: RunPlan) -> None:
    """Print it to standard output, before the progress."""
    config, layout, path, show = plan.config, plan.layout, plan.run_dir.path, MessageConsole(sys.stdout).message
    if plan.ranks_per_node:
        for line in summary(config, layout, config.cluster.max_nodes * plan.ranks_per_node):
            show(f"{path}: {line}")
    if config.data.live:
        show(f"{path}: data.live: text is tokenized while it is read; only {count_text(layout.data, 'data rank')} can resume this run")


def _detach(run_dir: RunDirectory, arguments: Sequence[str]) -> int:
    """Start `manta` in a new session, so that closing the terminal does not end it.

    Returns DONE once its controller has started. If it fails before, shows its output and returns its exit code.
    Raises InputError if another process is running the run.
    """
    with run_dir.lock():
        run_dir.logs.mkdir(exist_ok=True)
        events_before = len(read_events(run_dir.events_file))
    file = run_dir.logs / "controller.log"
    with file.open("ab") as log:
        start = log.tell()
        command = [sys.executable, "-P", "-m", "manta.launch", *arguments]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while process.poll() is None and len(read_events(run_dir.events_file)) == events_before:
            time.sleep(POLL_INTERVAL)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        raise
    if process.returncode is not None:
        notify(file.read_bytes()[start:].decode(errors="replace").rstrip())
        return process.returncode if process.returncode >= 0 else 128 - process.returncode
    notify(f"{run_dir.path}: running in the background; its messages are in {file}")
    for purpose, subcommand in (("show progress", "attach"), ("show the ranks' logs", "logs --follow"), ("stop", "stop")):
        notify(f"  {purpose}: manta {subcommand} {run_dir.quoted}")
    return ExitCode.DONE
