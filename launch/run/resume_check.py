"""Does a config go on with the run that is in its directory, or would it change it?"""

import json
from collections.abc import Mapping
from contextlib import suppress

import numpy as np

from manta.cluster.protocol import ExitCode
from manta.cluster.supervise.event_log import read_events
from manta.data.errors import InputError
from manta.data.live.live_samples import check_data_ranks
from manta.data.sampling.sampler import sample_numbers
from manta.launch.config import RunConfig, load
from manta.launch.run.display import say
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.manifest import from_bytes
from manta.trainer.dist.layout import Layout
from manta.trainer.run_directory import RunDirectory


def refuse_another_run(home: RunDirectory, config: RunConfig) -> None:
    """Raises InputError where the directory holds a run that this config would not go on with, and shows what differs."""
    if not home.config_file.exists() or not home.has_trained:
        return
    old = load(home.config_file)
    differ = _differences(old.identity(), config.identity())
    if config.train.steps < old.train.steps:
        differ.append(f"train.steps {old.train.steps} -> {config.train.steps} (may only grow)")
    reached = sample_numbers(old.data.skip, np.array([old.timeline().first_sample(home.saved_step() or 0)]))[0]
    read = [[span for span in data.skip if span[0] < reached] for data in (old.data, config.data)]
    if read[0] != read[1]:
        differ.append(f"data.skip {json.dumps(old.data.skip)} -> {json.dumps(config.data.skip)} (may change from sample {reached} on)")
    if differ:
        remedy = "choose another run.dir, or go on as it is: manta resume " + home.quoted
        raise InputError(f"{home.path}: holds a run of another config: {'; '.join(differ)}; {remedy}")
    refuse_lost_checkpoints(home, config)
    shape = config.schedule.shape
    if config.train.steps > old.train.steps and shape != "constant":
        say(f"train.steps {old.train.steps} -> {config.train.steps}: from here the learning rate is that of a {shape} over all of them")


def _differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Return a line for each key that differs. An identity leaves out keys that are newer than version 1 and at their default."""

    def value(identity: Mapping[str, object], key: str) -> str:
        return json.dumps(identity[key]) if key in identity else "default"

    keys = dict.fromkeys([*before, *now])
    return [f"{key} {value(before, key)} -> {value(now, key)}" for key in keys if value(before, key) != value(now, key)]


def refuse_lost_checkpoints(home: RunDirectory, config: RunConfig) -> None:
    """Raises InputError where the run's checkpoints are now looked for at a place that has none: it would begin anew, over them."""
    before, now = home.open_checkpoints(), home.checkpoints_in(config.checkpoint.directory)
    if str(now) != str(before) and before.names() and not now.names():
        remedy = f"copy them there, or leave it at {before}"
        raise InputError(f"checkpoint.directory: got {now}, where there is no checkpoint, wants those of the run; {remedy}")


def refuse_other_ranks(home: RunDirectory, layout: Layout) -> None:
    """Raises InputError where a live run has been saved by more or fewer data ranks; of a damaged checkpoint ranks have the last word."""
    where = home.open_checkpoints()
    for name in where.names()[:1]:
        with suppress(OSError, CheckpointError):
            check_data_ranks(from_bytes(where.manifest(name), where.location(name)).progress.cursors, layout.data)


def is_done(home: RunDirectory, config: RunConfig) -> bool:
    """Whether the run has ended well, at the last step, and nothing is left to do."""
    events = read_events(home.events_file)
    if home.saved_step() != config.train.steps or not events:
        return False
    return events[-1]["event"] == "run-ended" and events[-1]["exit_code"] == ExitCode.DONE
