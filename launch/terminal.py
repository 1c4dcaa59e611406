"""What several commands share: their arguments and options, JSON or a table on standard output, and messages on standard error."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from manta.data.errors import InputError, shown
from manta.data.messages import MessageConsole
from manta.data.storage.location import expand
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.run_directory import RunDirectory

T = TypeVar("T")
P = TypeVar("P", str, Path, Path | None)


def user_path(param: typer.CallbackParam, value: P) -> P:
    """Return a path or URL of the command line, with `~` replaced where the shell leaves it. Raises InputError if it cannot be one."""
    try:
        return value if value is None else type(value)(expand(str(value)))
    except ValueError as error:
        raise InputError(f"{param.opts[0]}: {error}") from None


def user_paths(param: typer.CallbackParam, values: Sequence[Path]) -> list[Path]:
    return [user_path(param, value) for value in values]


File = Annotated[Path, typer.Argument(metavar="FILE", help="The run's config, in YAML.", callback=user_path)]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", callback=user_path)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Override config keys: train.steps=100")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def open_standard_streams() -> None:
    """Open those that the caller has closed (`2>&-`): otherwise the next file that is opened takes their place, and gets their output."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115  for as long as the process
    if os.environ.get("COLUMNS") == "0":  # unknown; rich would take it for a width
        del os.environ["COLUMNS"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # print what the terminal's encoding lacks as an escape sequence
            stream.reconfigure(errors="backslashreplace")


def flush_standard_streams() -> None:
    """Write what is buffered. What cannot be written is dropped: the interpreter would report it, and end with another exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_report(report: T, show: Callable[[T], None], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report))
    else:
        show(report)


def notify(text: str) -> None:
    """Print a message to standard error."""
    MessageConsole(sys.stderr).message(text)


def resume_hint(run_dir: RunDirectory) -> str:
    """Describe what is saved of a run that has stopped, and how to resume it."""
    try:
        step = run_dir.saved_step()
        saved = f"step {step} is saved" if step else "nothing is saved yet"
    except CheckpointError as error:
        saved = str(error)
    return f"{saved}; resume with: manta resume {run_dir.quoted}"


def count_text(count: int, noun: str) -> str:
    """Return `1 rank` or `2 ranks`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def check_process() -> None:
    """Raises InputError for what no command can handle: arguments that are not text, and a working directory that is gone."""
    for argument in sys.argv[1:]:
        if (readable := argument.encode(errors="replace").decode()) != argument:
            expected = f"text in the encoding {sys.getfilesystemencoding()}"
            raise InputError(f"arguments: expected {expected}, got {shown(readable)}. Convert it, or set LC_ALL=C.UTF-8.")
    try:
        Path.cwd()
    except OSError as error:
        raise InputError(f"working directory: expected one that exists, got an error: {error.strerror}. Change to another.") from None
