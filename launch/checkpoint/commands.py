"""The commands of `manta checkpoint`. Each imports what it needs when it runs."""

import shlex
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from manta.cluster.protocol import ExitCode
from manta.data.errors import InputError
from manta.launch.config import find_run
from manta.launch.terminal import AsJson, File, Overrides, Run, count_text, notify, print_report, user_path

POLL = 0.2  # seconds

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, verify, inspect, prune and convert a run's checkpoints.")

Source = Annotated[
    str, typer.Argument(metavar="RUN", help="A run, an import, one of its checkpoints, or the URL of checkpoints.", callback=user_path)
]


@app.command("list", epilog="For example: manta checkpoint list runs/mine")
def list_(source: Source, *, as_json: AsJson = False) -> None:
    """List checkpoints, newest first, from their manifests. Their files are not read."""
    from manta.launch.checkpoint.inspect import list_checkpoints, show_listed

    print_report(list_checkpoints(source), show_listed, as_json=as_json)


@app.command(epilog="For example: manta checkpoint verify runs/mine")
def verify(source: Source, *, as_json: AsJson = False) -> None:
    """Read every byte, and print which checkpoints match their manifests. Exit code 1 if one does not."""
    from manta.launch.checkpoint.inspect import show_verified, verify

    reports = verify(source)
    print_report(reports, show_verified, as_json=as_json)
    if bad := sum(report["error"] is not None for report in reports):
        notify(f"{bad} of {count_text(len(reports), 'checkpoint')} cannot be used")
        raise typer.Exit(ExitCode.FAILED)


@app.command(epilog="For example: manta checkpoint inspect runs/mine --match 'blocks.0.*'")
def inspect(
    source: Source,
    *,
    match: Annotated[str, typer.Option(metavar="PATTERN", help="Only weights whose names match.")] = "*",
    as_json: AsJson = False,
) -> None:
    """Print a checkpoint's progress, and each weight's shape, norm, largest value, and the norms of its optimizer state.

    Of a run the newest valid checkpoint, or RUN/checkpoints/step-... One tensor at a time is held in memory.
    """
    from manta.launch.checkpoint.inspect import inspect, show_inspected

    print_report(inspect(source, match), show_inspected, as_json=as_json)


@app.command(epilog="For example: manta checkpoint prune runs/mine --keep 2 --best 1 --dry-run")
def prune(
    source: Source,
    *,
    keep: Annotated[int, typer.Option(min=1, help="Newest checkpoints to keep.")] = 1,
    best: Annotated[int, typer.Option(min=0, help="Also keep this many with the lowest validation loss.")] = 0,
    every: Annotated[int | None, typer.Option(min=1, help="Also keep multiples of this step.")] = None,
    bad: Annotated[bool, typer.Option("--bad", help="Also delete checkpoints that were set aside as bad.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be deleted.")] = False,
) -> None:
    """Delete checkpoints that are not kept. The newest valid one is always kept; every byte of it is read first."""
    from manta.launch.checkpoint.inspect import select_checkpoints
    from manta.trainer.checkpoint import catalog, retention
    from manta.trainer.run_directory import RunDirectory

    backend, _ = select_checkpoints(source)
    run = RunDirectory(Path(source).absolute())
    with run.lock() if run.config_file.exists() and not dry_run else nullcontext():
        newest = catalog.newest_valid(backend)
        assert newest is not None, "there is at least one name"
        kept = retention.Retention(newest=keep, best=best, every=every)
        names = retention.surplus(backend.names(), newest.name, kept, partial(retention.validation_loss, backend))
        for name in [*names, *(backend.bad() if bad else [])]:
            if not dry_run:
                backend.delete(name)
            typer.echo(f"{'would delete' if dry_run else 'deleted'} {name}")


@app.command(epilog="For example: manta checkpoint now runs/mine")
def now(run: Run, *, timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for the checkpoint.")] = 600.0) -> None:
    """Save a training run after its current step, and wait until the checkpoint is committed."""
    from manta.trainer.checkpoint.errors import SaveError

    run_directory = find_run(run)
    if not run_directory.is_locked:
        raise InputError(f"{run}: expected a run that is training, got one that is not. Resume it: manta resume {run_directory.quoted}.")
    backend, request_file = run_directory.open_checkpoints(), run_directory.save_request_file
    before = set(backend.names())
    request_file.touch()
    deadline = time.monotonic() + timeout
    while request_file.exists():
        if not run_directory.is_locked:
            request_file.unlink(missing_ok=True)
            break  # it has ended, and saved at its end
        if time.monotonic() > deadline:
            request_file.unlink(missing_ok=True)
            raise SaveError(f"{run_directory.path}: expected a checkpoint within {timeout:.0f} s, got none. Raise --timeout.")
        time.sleep(POLL)
    after = backend.names()
    if not after or after[0] in before:
        raise SaveError(f"{run_directory.path}: could not save. See {run_directory.path / 'logs'}.")
    typer.echo(backend.location(after[0]))


@app.command(epilog="For example: manta checkpoint convert their/checkpoints run.yaml")
def convert(
    source: Annotated[Path, typer.Argument(metavar="DS_DIR", help="The output of engine.save_checkpoint.", callback=user_path)],
    file: File,
    overrides: Overrides = None,
    *,
    names: Annotated[str | None, typer.Option(help="Names of the weights: manta or huggingface; detected if omitted.")] = None,
) -> None:
    """Convert a plain DeepSpeed checkpoint: weights, optimizer state, step and loss scale, under ZeRO 0, 1, 2 or 3.

    Makes the run directory, which must be new. The config must describe the same model, optimizer and batch.
    """
    from manta.launch.checkpoint.from_deepspeed import convert

    typer.echo(convert(source, file, overrides or [], names))
    typer.echo(f"continue with: {shlex.join(['manta', 'train', str(file), *(overrides or [])])}")
