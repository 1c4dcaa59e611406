"""`manta init` and `manta presets`: where a first run starts."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from manta.launch.terminal import AsJson, notify, print_report, user_path

app = typer.Typer()

NewFile = Annotated[Path, typer.Argument(metavar="FILE", help="The config to write; default: run.yaml.", callback=user_path)]
Preset = Annotated[str, typer.Option(metavar="NAME", help="The model: one of `manta presets`.")]
Data = Annotated[list[str] | None, typer.Option(help="Text to train on: a file, directory, glob, URL or hf:name. Repeat it for several.")]


@app.command(epilog="For example: manta init run.yaml --preset gpt2-124m --data 'texts/*.jsonl'")
def init(file: NewFile = Path("run.yaml"), *, preset: Preset = "llama-tiny", data: Data = None) -> None:
    """Write a commented config that trains as it is. It asks nothing, and overwrites nothing."""
    from manta.launch.presets.starter import write_starter

    write_starter(file, preset, data or ["stdlib:"])
    typer.echo(str(file))
    notify(f"{file}: written; train it with: manta train {shlex.quote(str(file))}")


@app.command(epilog="For example: manta presets --json")
def presets(*, as_json: AsJson = False) -> None:
    """List the presets: parameters, and the memory of weights, gradients and optimizer state in bf16 on one rank."""
    from manta.launch.presets.sizes import describe_presets, show

    print_report(describe_presets(), show, as_json=as_json)
