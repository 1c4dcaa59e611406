"""The trackers by name, and which of them a config asks for."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec

from manta.data.errors import InputError
from manta.launch.track.follow import Tracker
from manta.trainer.config.sections import TrackConfig
from manta.trainer.run_directory import RunDirectory

TRACKERS = {  # name: its module here, its class, the package that it needs
    "tensorboard": ("tensorboard", "TensorBoard", "tensorboard"),
    "wandb": ("wandb", "Wandb", "wandb"),
    "mlflow": ("mlflow", "Mlflow", "mlflow"),
    "prometheus": ("prometheus", "Prometheus", "prometheus_client"),
    "on_event": ("alerts", "Alerts", "json"),
}
"""Their modules are imported only when they are used."""
REMEDIES = {
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install 'manta[wandb]'",
    "mlflow": "pip install 'manta[mlflow]'",
    "prometheus": "pip install 'manta[prometheus]'",
}


def chosen(config: TrackConfig) -> list[str]:
    """Return the names of the trackers, alerts included, that a config asks for. Raises InputError if a package is not installed."""
    names = [name for name in TRACKERS if getattr(config, name)]
    for name in names:
        if find_spec(TRACKERS[name][2]) is None:
            raise InputError(f"track.{name}: expected the package {TRACKERS[name][2]}, got none. Install it: {REMEDIES[name]}")
    return names


def open_trackers(run_dir: RunDirectory, config: TrackConfig) -> Mapping[str, Callable[[], Tracker]]:
    """Return a function for each tracker that starts it."""
    return {name: partial(_open, name, run_dir, config) for name in chosen(config)}


def _open(name: str, run_dir: RunDirectory, config: TrackConfig) -> Tracker:
    module, class_name, _ = TRACKERS[name]
    return getattr(import_module(f"manta.launch.track.{module}"), class_name)(run_dir, config)
