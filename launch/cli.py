"""The `manta` command. Each command imports what it needs when it runs: help and config errors come at once."""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manta.cluster.protocol import ExitCode
from manta.data.errors import InputError
from manta.launch import __version__
from manta.launch.checkpoint.commands import app as checkpoint_app
from manta.launch.inspect.commands import app as data_app

if TYPE_CHECKING:
    from manta.trainer.run_directory import RunDirectory

CONTEXT = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=CONTEXT
)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")

File = Annotated[Path, typer.Argument(metavar="FILE", help="The run's config, in YAML.", show_default=False)]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Laid over the config: train.steps=100", show_default=False)
]
Detach = Annotated[bool, typer.Option("--detach", help="Go on in the background, and return once it is under way.")]

On = Annotated[
    str,
    typer.Option(
        metavar="TARGET", help="Where: local, ssh:FILE, slurm, kubernetes, http://HOST:8265 (a Ray elsewhere), auto (the Ray it is on)."
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Join a Ray that asks for no token: anyone may run code there.")]


@app.callback(invoke_without_command=True)
def manta(*, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Pretrains transformers, exactly and elastically: on a laptop, one GPU, or a cluster."""
    if version:
        typer.echo(f"manta {__version__}")
        raise typer.Exit


@app.command()
def train(
    file: File,
    overrides: Overrides = None,
    *,
    weights_only: Annotated[
        str | None,
        typer.Option(
            metavar="FROM",
            help="Begin with the weights of a run, an import or a checkpoint, and nothing else of it: run.start_from=FROM.",
            show_default=False,
        ),
    ] = None,
    detach: Detach = False,
    on: On = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what SLURM or Kubernetes would be handed, and do nothing.")] = False,
    insecure: Insecure = False,
) -> None:
    """Start a run, or go on with it where it was begun. Prepares the corpus first, where that is not done."""
    from manta.launch import config

    start = [] if weights_only is None else [f"run.start_from={json.dumps(weights_only)}"]
    from manta.launch.targets.dispatch import launch

    laid_over = [*(overrides or []), *start]
    loaded = config.load(file, laid_over)
    detached = ["train", str(file), *laid_over, f"--on={on}", *(["--insecure"] if insecure else [])] if detach else []
    raise typer.Exit(launch(loaded, on, dry_run=dry_run, insecure=insecure, detached=detached))


@app.command()
def resume(run: Run, overrides: Overrides = None, *, detach: Detach = False, on: On = "local", insecure: Insecure = False) -> None:
    """Go on with a run from its newest valid checkpoint, on whatever ranks are at hand."""
    from manta.launch import config
    from manta.launch.targets.dispatch import launch

    loaded = config.load(config.resume_config(run), [*(overrides or []), f"run.dir={json.dumps(str(run.absolute()))}"])
    detached = ["resume", str(run), *(overrides or []), f"--on={on}", *(["--insecure"] if insecure else [])] if detach else []
    raise typer.Exit(launch(loaded, on, insecure=insecure, detached=detached))


@app.command()
def drill(file: File, overrides: Overrides = None, *, on: On = "local", insecure: Insecure = False) -> None:
    """Do to a short run, beside it, what will happen to a long one, fault by fault, and see that it learns the same."""
    from manta.launch import config
    from manta.launch.drill.drill import DRILL_DEFAULTS, drill
    from manta.launch.targets.dispatch import connect

    loaded = config.load(file, [*DRILL_DEFAULTS, *(overrides or [])])
    raise typer.Exit(drill(loaded, connect(loaded, on, insecure=insecure)))


@app.command(context_settings={"allow_interspersed_args": False})
def at(
    address: Annotated[str, typer.Argument(metavar="http://HOST:8265", help="Of the Ray's dashboard.", show_default=False)],
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="status, logs, stop, attach, ...", show_default=False)],
    *,
    insecure: Insecure = False,
) -> None:
    """Give a command on a node of a Ray elsewhere, which sees what this machine does not: at http://head:8265 status /shared/run."""
    from manta.launch.targets.ray_job import run_command

    raise typer.Exit(run_command(address, command, insecure=insecure))


@app.command()
def attach(run: Run) -> None:
    """Watch a run that is in the background, or anywhere; ends with its exit code. Ctrl-C ends the watching, not the run."""
    from manta.launch.control.attach import attach as show

    raise typer.Exit(show(run))


@app.command()
def stop(
    run: Run,
    *,
    at_once: Annotated[bool, typer.Option("--at-once", help="Do not save: what a second Ctrl-C does.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for it.")] = 600.0,
) -> None:
    """Have a run save and leave, whichever machine it is on, and wait until it has."""
    from manta.launch.control.stop import stop as end

    try:
        typer.echo(end(run, at_once=at_once, timeout=timeout))
    except TimeoutError as error:
        typer.echo(f"manta: {error}", err=True)
        raise typer.Exit(ExitCode.FAILED) from None


@app.command()
def logs(
    run: Run,
    *,
    rank: Annotated[int, typer.Option(min=0, help="Whose.")] = 0,
    attempt: Annotated[int | None, typer.Option(min=1, help="Of which attempt; the newest where not given.", show_default=False)] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on, attempt after attempt, until the run ends.")] = False,
) -> None:
    """What a rank has written: its log, and whatever libraries said there."""
    from manta.launch.control.logs import logs as read

    for text in read(run, rank=rank, attempt=attempt, follow=follow):
        sys.stdout.buffer.write(text)
        sys.stdout.flush()


@app.command()
def prepare(file: File, overrides: Overrides = None) -> None:
    """Tokenize the config's corpus, once. Training does it too; here it is done without."""
    from manta.data.prepare.prepare import prepare as prepare_corpus
    from manta.launch import config

    loaded = config.load(file, overrides or [])
    prepared = prepare_corpus(loaded.data, loaded.tokenizer)
    for corpus in prepared.corpora:
        typer.echo(corpus)


@app.command()
def status(run: Run, *, as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """How a run stands."""
    from manta.launch.control import status as report

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
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed writes the same text.")] = 1,
) -> None:
    """Write text with a run's newest checkpoint, or with an imported model."""
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"--top-p: got {top_p}, wants a probability above 0, at most 1; try 0.95")
    home = _trained(run)
    from manta.trainer.serve.generate import Sampling, generate_text

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    for text in generate_text(home, prompt, count=tokens, sampling=sampling):
        typer.echo(text, nl=False)
    typer.echo()


@app.command()
def export(
    run: Run,
    *,
    output: Annotated[Path | None, typer.Option(help="Where to; RUN/export/hf where not given.", show_default=False)] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 (as runs have it), bfloat16 or float16; as it came where imported.", show_default=False)
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest file of weights: 5GB, 500MB.")] = "5GB",
) -> None:
    """Write the newest checkpoint for Hugging Face transformers: config, safetensors, tokenizer, model card."""
    if dtype not in {None, "float32", "bfloat16", "float16"}:
        raise InputError(f"--dtype: got {dtype}, wants float32, bfloat16 or float16")
    limit = _bytes(shard_size)
    home = _trained(run)
    from manta.trainer.convert.huggingface.directory import refuse_to_overwrite

    directory = home.path / "export" / "hf" if output is None else output.absolute()
    refuse_to_overwrite(directory, home)
    import torch

    from manta.trainer.convert.formats import EXPORTERS
    from manta.trainer.pretrained.load import load_pretrained

    EXPORTERS["hf"](load_pretrained(home), directory, dtype=None if dtype is None else getattr(torch, dtype), shard_size=limit)
    typer.echo(str(directory))


@app.command("import")
def import_(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Of config.json, safetensors and tokenizer.json.", show_default=False)],
    *,
    output: Annotated[
        Path | None, typer.Option(help="Where to; imported/NAME where not given, of a run's export the run's.", show_default=False)
    ] = None,
) -> None:
    """Take in a model of Hugging Face transformers: GPT-2, Llama, Mistral, Qwen3, BERT, and mixtures of experts."""
    from manta.trainer.convert.huggingface.directory import check_import, import_name

    place = Path("imported") / import_name(directory) if output is None else output
    check_import(directory, place)
    from manta.trainer.convert.formats import IMPORTERS

    IMPORTERS["hf"](directory, place)
    typer.echo(str(place))


def _bytes(text: str) -> int:
    """5GB -> 5 000 000 000."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text.strip(), re.IGNORECASE)) or float(found[1]) == 0:
        raise InputError(f"--shard-size: got {text!r}, wants a size such as 5GB or 500MB")
    return int(float(found[1]) * units[found[2].upper()])


def _trained(run: Path) -> "RunDirectory":
    """The run, or the import, in a directory. Its mistakes are told before torch is imported."""
    from manta.launch import config
    from manta.trainer.run_directory import RunDirectory

    home = RunDirectory(run.absolute())
    if (home.path / "source.json").exists():
        return home
    config.load(config.resume_config(run))
    if not home.saved_step():
        raise InputError(f"{run}: got no checkpoint, wants one; train first: manta resume {home.quoted}")
    return home


def main() -> None:
    """The console script. Bad input ends with a line each and exit code 2."""
    if sys.platform != "linux":
        sys.stderr.write(f"manta: got {sys.platform}, wants Linux: it supervises processes by means that others lack\n")
        sys.exit(ExitCode.USAGE)
    try:
        app(prog_name="manta")
    except InputError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"manta: {line}\n")
        sys.exit(ExitCode.USAGE)
    except Exception as error:
        from manta.trainer.checkpoint.errors import CheckpointError, SaveError

        if not isinstance(error, CheckpointError | SaveError):
            raise
        sys.stderr.write(f"manta: {error}\n")
        sys.exit(ExitCode.FAILED)
