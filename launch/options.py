"""Arguments and options that several commands have."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

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
