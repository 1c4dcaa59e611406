"""The commands of `manta checkpoint`. Each imports what it needs when it runs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from manta.cluster.protocol import ExitCode

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="A run's checkpoints: which there are, whether they are whole, what is in them."
)

Where = Annotated[
    str, typer.Argument(metavar="RUN", help="A run, an import, one checkpoint of it, or the URL where they lie.", show_default=False)
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command("list", epilog="For example: manta checkpoint list runs/mine")
def list_(where: Where, *, as_json: AsJson = False) -> None:
    """Which checkpoints there are, newest first, as their manifests tell; their files are not read."""
    from manta.launch.checkpoint.list import checkpoints, show

    told = checkpoints(where)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        show(told)


@app.command(epilog="For example: manta checkpoint verify runs/mine")
def verify(where: Where, *, as_json: AsJson = False) -> None:
    """Read every byte, and tell which checkpoints hold what their manifest says. Exit code 1 where one does not."""
    from manta.launch.checkpoint import verify

    told = verify.verify(where)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        verify.show(told)
    if any(one["error"] for one in told):
        raise typer.Exit(ExitCode.FAILED)


@app.command(epilog="For example: manta checkpoint inspect runs/mine --match 'blocks.0.*'")
def inspect(
    where: Where,
    *,
    match: Annotated[str, typer.Option(metavar="PATTERN", help="Of these weights alone.")] = "*",
    as_json: AsJson = False,
) -> None:
    """What a checkpoint holds: progress, and of each weight its shape, norm, largest value, and the norms of its optimizer state.

    Of a run the newest valid one, or RUN/checkpoints/step-... One tensor at a time is held in memory.
    """
    from manta.launch.checkpoint import inspect

    told = inspect.inspect(where, match)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        inspect.show(told)


@app.command(epilog="For example: manta checkpoint prune runs/mine --keep 2 --every 10000 --dry-run")
def prune(
    where: Where,
    *,
    keep: Annotated[int, typer.Option(min=1, help="Newest ones to keep.")] = 1,
    best: Annotated[int, typer.Option(min=0, help="Ones of the lowest validation loss to keep, too.")] = 0,
    every: Annotated[int | None, typer.Option(min=1, help="Steps whose multiples are kept, too.", show_default=False)] = None,
    bad: Annotated[bool, typer.Option("--bad", help="Delete those that were set aside as bad, too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Delete checkpoints that are kept no more. The newest valid one stays whatever is asked for; it is read first, every byte."""
    from manta.launch.checkpoint import prune

    for name in prune.prune(where, keep=keep, best=best, every=every, bad=bad, dry_run=dry_run):
        typer.echo(f"{'would delete' if dry_run else 'deleted'} {name}")


@app.command(epilog="For example: manta checkpoint now runs/mine")
def now(
    run: Run,
    *,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for it.")] = 600.0,
) -> None:
    """Have a run that is training write one after the step that it is at, and wait until it is there."""
    from manta.launch.checkpoint import request

    typer.echo(request.now(run, timeout=timeout))


@app.command(epilog="For example: manta checkpoint convert deepspeed/checkpoints run.yaml run.dir=runs/mine")
def convert(
    source: Annotated[Path, typer.Argument(metavar="DS_DIR", help="What engine.save_checkpoint wrote.", show_default=False)],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The config of the run that goes on from there.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Laid over the config.", show_default=False)
    ] = None,
    *,
    names: Annotated[
        str | None,
        typer.Option(
            metavar="WHOSE", help="manta or huggingface: whose names the model had. Not given, the files tell.", show_default=False
        ),
    ] = None,
) -> None:
    """Go on with manta where plain DeepSpeed stopped: weights, optimizer state, step and loss scale, under ZeRO 0, 1, 2 or 3.

    Makes the run directory, which must be new. The config says what the run was: the same model, optimizer and batch.
    """
    from manta.launch.checkpoint import convert

    typer.echo(convert.convert(source, file, overrides or [], names))
    typer.echo(f"go on with it: {convert.next_command(file, overrides or [])}")
