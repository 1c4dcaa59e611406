"""`manta track`: write the metrics and events of a run to trackers."""

import json
import logging
import threading
from typing import Annotated

import typer

from manta.data.errors import DataError, InputError
from manta.launch.terminal import Run

NO_ALERTS = ("track.on_event=[]",)  # the run itself has sent them
NO_TRACKERS = ("track.tensorboard=false", "track.wandb=null", "track.mlflow=null", "track.prometheus=null")
app = typer.Typer()


@app.command(epilog="For example: manta track runs/mine --wandb my-project")
def track(
    run: Run,
    *,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write RUN/tensorboard.")] = False,
    wandb: Annotated[str | None, typer.Option(metavar="PROJECT", help="Write to this project of Weights & Biases.")] = None,
    mlflow: Annotated[str | None, typer.Option(metavar="URI", help="Write to this MLflow server or directory.")] = None,
    prometheus: Annotated[int | None, typer.Option(metavar="PORT", help="Serve the newest metrics at this port of 127.0.0.1.")] = None,
) -> None:
    """Write a run's metrics and events to trackers; default: those of its config. Follows a run that is running until it ends."""
    from manta.launch.config import find_run, load
    from manta.launch.track.follow import track
    from manta.launch.track.trackers import chosen, open_trackers

    run_dir = find_run(run)
    options = {
        "tensorboard": tensorboard or None,
        "wandb": None if wandb is None else {"project": wandb},
        "mlflow": None if mlflow is None else {"uri": mlflow},
        "prometheus": prometheus,
    }
    named = [f"track.{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    own = load(run_dir.config_file).track
    config = load(run_dir.config_file, [*NO_ALERTS, *(NO_TRACKERS if named else ()), *named]).track
    names = chosen(config)
    if run_dir.is_locked and (both := [name for name in names if getattr(own, name)]):
        remedy = f"The run writes to {' and '.join(both)} itself: wait for its end, or name another."
        raise InputError(f"{run}: expected a tracker that the run does not have, got {', '.join(both)}. {remedy}")
    if not names:
        raise InputError(f"{run}: expected a tracker, got none in its config. Name one: manta track {run_dir.quoted} --tensorboard")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("manta.launch.track").setLevel(logging.INFO)
    if failed := track(run_dir, open_trackers(run_dir, config), threading.Event()):
        raise DataError("\n".join(failed.values()))
