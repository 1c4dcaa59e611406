"""What several commands share: their arguments and options, JSON or a table on standard output, and messages on standard error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from manta.trainer.run_directory import RunDirectory

T = TypeVar("T")

File = Annotated[Path, typer.Argument(metavar="FILE", help="The run's config, in YAML.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override config keys: train.steps=100")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_report(report: T, show: Callable[[T], None], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report))
    else:
        show(report)


class MessageConsole(Console):
    """Writes plain lines to standard error. If its reader is gone, it stays silent, and the run continues."""

    def __init__(self) -> None:
        super().__init__(stderr=True, soft_wrap=True, highlight=False, markup=False)

    def on_broken_pipe(self) -> None:
        self.quiet = True


def notify(text: str) -> None:
    """Print a message."""
    MessageConsole().print(text)


def resume_hint(run_dir: RunDirectory) -> str:
    """Describe what is saved of a run that has stopped, and how to resume it."""
    step = run_dir.saved_step()
    saved = f"step {step} is saved" if step else "nothing is saved yet"
    return f"{saved}; resume with: manta resume {run_dir.quoted}"


def count_text(count: int, noun: str) -> str:
    """Return `1 rank` or `2 ranks`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
