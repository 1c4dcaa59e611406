"""`manta status`: the state of a run, once or live."""

from typing import Annotated

import typer

from manta.data.errors import InputError
from manta.launch.terminal import AsJson, Run, print_report

app = typer.Typer()


@app.command(epilog="For example: manta status runs/mine --watch")
def status(
    run: Run,
    *,
    as_json: AsJson = False,
    live: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it live, with the loss curve and the last events, until the run ends.")
    ] = False,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with the run's own exit code; 3: it is running, 4: it was killed.")
    ] = False,
) -> None:
    """Print the state of a run: step, losses, speed, layout, failures, newest checkpoint, goodput."""
    from manta.launch.control.status import print_status, status, status_code
    from manta.launch.control.watch import watch

    if live and as_json:
        raise InputError("--watch: expected no --json, which is for programs. Use one of them.")
    if live:
        state = watch(run)
    else:
        state = status(run)
        print_report(state, print_status, as_json=as_json)
    if exit_code:
        raise typer.Exit(status_code(state))
