"""Whether a config resumes the run that is in its directory, or would change it."""

import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress

import numpy as np

from manta.cluster.protocol import ExitCode
from manta.cluster.supervise.event_log import exit_code, read_events
from manta.data.config import DataConfig
from manta.data.errors import InputError
from manta.data.live.live_samples import check_data_ranks
from manta.data.sampling.samples import sample_numbers
from manta.launch.config import RunConfig, load
from manta.launch.terminal import notify
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.manifest import from_bytes
from manta.trainer.dist.layout import Layout
from manta.trainer.optim.schedules import learning_rate
from manta.trainer.run_directory import RunDirectory


def check_same_run(run_dir: RunDirectory, config: RunConfig) -> None:
    """Raises InputError, which lists the differences, if the directory has a run that this config does not resume.

    Raises UnreachableError if this user may not read its newest checkpoint.
    """
    if not run_dir.config_file.exists() or not run_dir.has_trained:
        return
    old = load(run_dir.config_file)
    differences = _differences(old.identity(), config.identity())
    if config.train.steps < old.train.steps:
        differences.append(f"train.steps {old.train.steps} -> {config.train.steps} (may only grow)")
    next_sample = sample_numbers(old.data.skip, np.array([old.timeline().first_sample(run_dir.saved_step())]))[0]
    before, now = (spans_before(int(next_sample), data) for data in (old.data, config.data))
    if before != now:
        spans = f"{json.dumps(old.data.skip)} -> {json.dumps(config.data.skip)}"
        differences.append(f"data.skip {spans} (may change from sample {next_sample} on)")
    if differences:
        remedy = f"Use another run.dir, or resume with the run's own config: manta resume {run_dir.quoted}"
        raise InputError(f"{run_dir.path}: expected the config of the run in it, got another one: {'; '.join(differences)}. {remedy}")
    checkpoints, now = run_dir.open_checkpoints(), run_dir.checkpoints_in(config.checkpoint.directory)
    if str(now) != str(checkpoints) and checkpoints.names() and not now.names():  # else the run would start again from step 0
        remedy = f"Copy them there, or keep {checkpoints}."
        raise InputError(f"checkpoint.directory: expected the run's checkpoints, got {now}, which has none. {remedy}")
    for name in now.names()[:1]:
        now.check_readable(name)
    _report_learning_rate(old, config, run_dir.saved_step())


def check_same_data_ranks(run_dir: RunDirectory, layout: Layout) -> None:
    """Raises InputError if a live run was saved on another number of data ranks. If its checkpoint is damaged, the ranks decide."""
    checkpoints = run_dir.open_checkpoints()
    for name in checkpoints.names()[:1]:
        with suppress(OSError, CheckpointError):
            check_data_ranks(from_bytes(checkpoints.manifest(name), checkpoints.location(name)).progress.cursors, layout.data)


def is_finished(run_dir: RunDirectory, config: RunConfig) -> bool:
    """Whether the run has ended well, with its last step saved."""
    return run_dir.saved_step() == config.train.steps and exit_code(read_events(run_dir.events_file)) == ExitCode.DONE


def _report_learning_rate(old: RunConfig, new: RunConfig, step: int) -> None:
    """Say so if the learning rate of the next step depends on how far the run was planned to go. step: finished ones."""
    before, now = (
        learning_rate(config.schedule, peak=config.optimizer.learning_rate, step=step, steps=config.train.steps) for config in (old, new)
    )
    if before != now:
        plans = [config.schedule.steps or config.train.steps for config in (old, new)]
        rates = f"{before:.3g} in the schedule of {plans[0]} steps, {now:.3g} in that of {plans[1]}"
        notify(f"learning rate of step {step + 1}: {rates}; to keep the first schedule: schedule.steps={plans[0]}")


def spans_before(sample: int, data: DataConfig) -> list[tuple[int, int]]:
    """Return what is skipped of the samples before this one, in the fewest ranges."""
    return [(first, min(end, sample)) for first, end in data.skip_also(data.skip).skip if first < sample]


def _text(value: object) -> str:
    """Return JSON without what is unset: of a source, hardly anything is set."""
    return json.dumps(json.loads(json.dumps(value), object_hook=lambda keys: {key: one for key, one in keys.items() if one is not None}))


def _differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Return a text for each key that differs. An identity has no key that is newer than version 1 and at its default."""
    texts = [defaultdict(lambda: "default", {key: _text(value) for key, value in identity.items()}) for identity in (before, now)]
    pairs = {key: (texts[0][key], texts[1][key]) for key in dict.fromkeys([*before, *now])}
    return [f"{key} {old} -> {new}" for key, (old, new) in pairs.items() if old != new]
