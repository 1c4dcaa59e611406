"""The `manta` command. Each command imports what it needs when it runs: help and config errors come at once."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manta.data.errors import InputError
from manta.launch import __version__

if TYPE_CHECKING:
    from manta.trainer.rundir import RunDirectory

FAILED, USAGE = 1, 2
CONTEXT = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=CONTEXT
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="The run's config, in YAML.", show_default=False)]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Laid over the config: train.steps=100", show_default=False)
]


@app.callback(invoke_without_command=True)
def manta(*, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Pretrains transformers, exactly and elastically: on a laptop, one GPU, or a cluster."""
    if version:
        typer.echo(f"manta {__version__}")
        raise typer.Exit


@app.command()
def train(file: File, overrides: Overrides = None) -> None:
    """Start a run, or go on with it where it was begun. Prepares the corpus first, where that is not done."""
    from manta.launch import config

    loaded = config.load(file, overrides or [])
    from manta.launch.train import train as start

    raise typer.Exit(start(loaded))


@app.command()
def resume(run: Run, overrides: Overrides = None) -> None:
    """Go on with a run from its newest valid checkpoint, on whatever ranks are at hand."""
    from manta.launch import config
    from manta.launch.train import resume_config
    from manta.launch.train import train as start

    raise typer.Exit(start(config.load(resume_config(run), [*(overrides or []), f"run.dir={json.dumps(str(run.absolute()))}"])))


@app.command()
def prepare(file: File, overrides: Overrides = None) -> None:
    """Tokenize the config's corpus, once. Training does it too; here it is done without."""
    from manta.data.prepare import prepare as prepare_corpus
    from manta.launch import config

    loaded = config.load(file, overrides or [])
    prepared = prepare_corpus(loaded.data, loaded.tokenizer)
    typer.echo("\n".join(str(corpus) for corpus in prepared.corpora))


@app.command()
def status(run: Run, *, as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """How a run stands."""
    from manta.launch import status as report

    told = report.status(run)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        report.show(told)


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")] = "",
    *,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest.", show_default=False)] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that have this probability.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 1,
) -> None:
    """Write text with a run's newest checkpoint."""
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"--top-p: got {top_p}, wants a probability above 0, at most 1; try 0.95")
    home = _trained(run)
    from manta.trainer.generate import Sampling, write

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    for text in write(home, prompt, count=tokens, sampling=sampling):
        typer.echo(text, nl=False)
    typer.echo()


@app.command()
def export(
    run: Run,
    *,
    output: Annotated[Path | None, typer.Option(help="Where to; RUN/export/hf where not given.", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Write the newest checkpoint as a Hugging Face Llama: config, safetensors, tokenizer."""
    if dtype not in {"float32", "bfloat16", "float16"}:
        raise InputError(f"--dtype: got {dtype}, wants float32, bfloat16 or float16")
    home = _trained(run)
    import torch

    from manta.trainer.convert import huggingface
    from manta.trainer.pretrained import load_pretrained

    directory = home.path / "export" / "hf" if output is None else output.absolute()
    huggingface.export(load_pretrained(home), directory, dtype=getattr(torch, dtype))
    typer.echo(str(directory))


def _trained(run: Path) -> "RunDirectory":
    """The run in a directory. Its mistakes are told before torch is imported."""
    from manta.launch import config
    from manta.launch.train import resume_config
    from manta.trainer.rundir import RunDirectory

    config.load(resume_config(run))
    home = RunDirectory(run.absolute())
    if not home.saved_step:
        raise InputError(f"{run}: got no checkpoint, wants one; train first: manta resume {home.typed}")
    return home


def main() -> None:
    """The console script. Bad input ends with a line each and exit code 2."""
    if sys.platform != "linux":
        sys.stderr.write(f"manta: got {sys.platform}, wants Linux: it supervises processes by means that others lack\n")
        sys.exit(USAGE)
    try:
        app(prog_name="manta")
    except InputError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"manta: {line}\n")
        sys.exit(USAGE)
    except Exception as error:
        from manta.trainer.checkpoint.errors import CheckpointError

        if not isinstance(error, CheckpointError):
            raise
        sys.stderr.write(f"manta: {error}\n")
        sys.exit(FAILED)
