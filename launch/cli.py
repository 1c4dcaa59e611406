"""The `manta` command. Each command imports torch and Ray only when it runs, so that help and config errors appear at once."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from manta.cluster.line_file import NO_ROOM
from manta.cluster.protocol import ExitCode, deny_writes_by_others, raise_open_files_limit
from manta.data.errors import DataError, InputError
from manta.launch import __version__
from manta.launch.checkpoint.commands import app as checkpoint_app
from manta.launch.config import find_run, find_trained_run, load
from manta.launch.control.commands import app as control_app
from manta.launch.inspect.commands import app as data_app
from manta.launch.presets.commands import app as presets_app
from manta.launch.report.commands import app as report_app
from manta.launch.terminal import (
    File,
    Overrides,
    Run,
    check_process,
    flush_standard_streams,
    notify,
    open_standard_streams,
    user_path,
)
from manta.launch.track.commands import app as track_app

DTYPES = ("float32", "bfloat16", "float16")

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
for commands in (control_app, presets_app, report_app, track_app):
    app.add_typer(commands)

Detach = Annotated[bool, typer.Option("--detach", help="Run in the background; return when the run has started.")]
TARGETS = "local, ssh:FILE, slurm, kubernetes, http://HOST:8265 (submit to a Ray cluster), auto or HOST:PORT (join one)"
On = Annotated[str, typer.Option(metavar="TARGET", help=f"Where to run: {TARGETS}.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print layout, idle ranks, batches, nodes and what would run. Start nothing.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Accept a Ray cluster without a token: anyone who reaches it can run code.")]
WeightsOnly = Annotated[str | None, typer.Option(metavar="FROM", help="Start from the weights of a run or an import: run.start_from=FROM.")]


@app.callback(invoke_without_command=True)
def manta(*, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Pretrain transformers reproducibly and elastically, on a laptop, one GPU or a cluster."""
    if version:
        typer.echo(f"manta {__version__}")
        raise typer.Exit


@app.command(epilog="For example: manta train run.yaml train.steps=1000 parallel.zero=2")
def train(
    file: File,
    overrides: Overrides = None,
    *,
    weights_only: WeightsOnly = None,
    detach: Detach = False,
    on: On = "local",
    dry_run: DryRun = False,
    insecure: Insecure = False,
) -> None:
    """Start a run, or resume it if it was started before. Prepares the corpus first, unless already done.

    Progress goes to standard output: a bar on a terminal, else a line every ten seconds (manta train ... | tee log). Errors that end
    the command, and how far the corpus is prepared, go to standard error.
    """
    from manta.launch.targets.dispatch import launch

    all_overrides = [*(overrides or []), *([] if weights_only is None else [f"run.start_from={json.dumps(weights_only)}"])]
    loaded = load(file, all_overrides)
    detached = _arguments("train", file, all_overrides, on, insecure=insecure) if detach else []
    raise typer.Exit(launch(loaded, on, dry_run=dry_run, insecure=insecure, detached=detached))


@app.command(epilog="For example: manta resume runs/mine cluster.nodes=2")
def resume(
    run: Run,
    overrides: Overrides = None,
    *,
    detach: Detach = False,
    on: On = "local",
    dry_run: DryRun = False,
    insecure: Insecure = False,
) -> None:
    """Resume a run from its newest valid checkpoint, on the nodes that are available now."""
    from manta.launch.targets.dispatch import launch

    loaded = load(find_run(run).config_file, [*(overrides or []), f"run.dir={json.dumps(str(run.absolute()))}"])
    detached = _arguments("resume", run, overrides or [], on, insecure=insecure) if detach else []
    raise typer.Exit(launch(loaded, on, dry_run=dry_run, insecure=insecure, detached=detached))


@app.command(epilog="For example: manta drill run.yaml --on ssh:hosts.txt")
def drill(file: File, overrides: Overrides = None, *, on: On = "local", insecure: Insecure = False) -> None:
    """Inject faults into a short copy of a run, and check that it recovers, with the same losses as without faults."""
    from manta.launch.drill.drill import DRILL_DEFAULTS, drill
    from manta.launch.targets.dispatch import connect

    loaded = load(file, [*DRILL_DEFAULTS, *(overrides or [])])
    raise typer.Exit(drill(loaded, connect(loaded, on, insecure=insecure)))


@app.command(context_settings={"allow_interspersed_args": False}, epilog="For example: manta at http://head:8265 status /shared/runs/mine")
def at(
    address: Annotated[str, typer.Argument(metavar="http://HOST:8265", help="Address of the Ray dashboard.")],
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", help="status, logs, stop, attach, ...")],
    *,
    insecure: Insecure = False,
) -> None:
    """Run a manta command on a node of a Ray cluster, for run directories that this machine cannot see."""
    from manta.launch.targets.ray_job import run_command

    raise typer.Exit(run_command(address, command, insecure=insecure))


@app.command(epilog="For example: manta attach runs/mine")
def attach(run: Run) -> None:
    """Follow a run started with --detach or on another machine, and exit with its exit code. Ctrl-C detaches; the run continues."""
    from manta.launch.control.attach import attach

    raise typer.Exit(attach(run))


@app.command(epilog="For example: manta stop runs/mine --timeout 60")
def stop(
    run: Run,
    *,
    at_once: Annotated[bool, typer.Option("--at-once", help="Stop without saving, as a second Ctrl-C does.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for the run to end.")] = 600.0,
) -> None:
    """Ask a run to save and exit, from any machine that sees its directory, and wait until it has."""
    from manta.launch.control.stop import stop

    try:
        typer.echo(stop(run, at_once=at_once, timeout=timeout))
    except TimeoutError as error:
        typer.echo(f"manta: {error}", err=True)
        raise typer.Exit(ExitCode.FAILED) from None


@app.command(epilog="For example: manta logs runs/mine --rank 3 --follow")
def logs(
    run: Run,
    *,
    rank: Annotated[int, typer.Option(min=0, help="Rank to print the log of.")] = 0,
    attempt: Annotated[int | None, typer.Option(min=1, help="The attempt; default: the newest.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines as they are written, until the run ends.")] = False,
) -> None:
    """Print the log of a rank, including the output of libraries."""
    from manta.launch.control.logs import logs

    for text in logs(run, rank=rank, attempt=attempt, follow=follow):
        sys.stdout.buffer.write(text)
        sys.stdout.flush()


@app.command(epilog="For example: manta prepare run.yaml data.workers=16")
def prepare(file: File, overrides: Overrides = None) -> None:
    """Prepare the config's corpus: tokenize it and write token shards. `manta train` does this automatically."""
    from manta.launch.run.preflight import prepare_all

    for corpus in prepare_all(load(file, overrides or [])):
        typer.echo(corpus)


@app.command(epilog='For example: manta generate runs/mine "def read(" --tokens 64')
def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")] = "",
    *,
    tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 takes the most likely token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling: the most likely tokens whose probabilities sum to this.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling; the same seed generates the same text.")] = 1,
) -> None:
    """Generate text with a run's newest checkpoint, or with an imported model."""
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"--top-p: expected a probability above 0 and at most 1, got {top_p}. Use 0.95, for example.")
    run_dir = find_trained_run(run)
    from manta.trainer.serve.generate import Sampling, generate_text

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    for text in generate_text(run_dir, prompt, count=tokens, sampling=sampling):
        typer.echo(text, nl=False)
    typer.echo()


@app.command(epilog="For example: manta export runs/mine --output exported --dtype bfloat16")
def export(
    run: Run,
    *,
    output: Annotated[Path | None, typer.Option(help="Directory to write; default: RUN/export/hf.", callback=user_path)] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; default: float32, or that of the imported model.")] = None,
    shard_size: Annotated[str, typer.Option(help="Maximum size of a file of weights: 5GB, 500MB.")] = "5GB",
) -> None:
    """Export the newest checkpoint to Hugging Face transformers: config, safetensors, tokenizer, model card."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype: expected {', '.join(DTYPES)}, got {dtype}. Use one of them.")
    from pydantic import ByteSize, Field, TypeAdapter, ValidationError

    try:
        max_bytes = TypeAdapter(Annotated[ByteSize, Field(gt=0)]).validate_python(shard_size)
    except ValidationError:
        raise InputError(f"--shard-size: expected a size, got {shard_size!r}. Use 5GB or 500MB, for example.") from None
    run_dir = find_trained_run(run)
    from manta.trainer.convert.huggingface.directory import refuse_to_overwrite

    directory = run_dir.path / "export" / "hf" if output is None else output.absolute()
    if output is None and (linked := directory.resolve()) != run_dir.path.resolve() / "export" / "hf":
        raise InputError(f"{directory}: expected a directory in the run, got a link to {linked}. Use --output to export there.")
    refuse_to_overwrite(directory, run_dir)
    import torch

    from manta.trainer.convert.huggingface.export import export
    from manta.trainer.pretrained.load import load_pretrained

    export(load_pretrained(run_dir), directory, dtype=None if dtype is None else getattr(torch, dtype), shard_size=max_bytes)
    typer.echo(str(directory))


@app.command("import", epilog="For example: manta import downloads/gpt2 --output imported/gpt2")
def import_(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Has config.json, safetensors, tokenizer.json.", callback=user_path)],
    *,
    output: Annotated[Path | None, typer.Option(help="Default: imported/NAME, named after DIR or its run.", callback=user_path)] = None,
) -> None:
    """Import a model from Hugging Face transformers: GPT-2, Llama, Mistral, Qwen3, BERT, and mixtures of experts."""
    from manta.trainer.convert.huggingface.directory import check_import, import_name

    destination = Path("imported") / import_name(directory) if output is None else output
    check_import(directory, destination)
    from manta.trainer.convert.huggingface.import_model import import_model

    import_model(directory, destination)
    typer.echo(str(destination))


def _arguments(command: str, path: Path, overrides: list[str], on: str, *, insecure: bool) -> list[str]:
    """Return the arguments of the same command without --detach."""
    return [command, str(path), *overrides, f"--on={on}", *(["--insecure"] if insecure else [])]


def main() -> None:
    """Run the console script. An InputError ends it with exit code 2 and a line per problem."""
    open_standard_streams()
    if sys.platform != "linux":
        sys.stderr.write(f"manta: expected Linux, because it uses Linux process supervision, got {sys.platform}. Use a Linux machine.\n")
        sys.exit(ExitCode.USAGE)
    deny_writes_by_others()
    raise_open_files_limit()
    try:
        check_process()
        app(prog_name="manta")
    except Exception as error:
        from manta.trainer.checkpoint.errors import CheckpointError, SaveError

        message = str(error)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            problem = f"expected a file that can be used, got an error: {error.strerror or error}. Correct it, and try again."
            problem = f"{error.strerror}. Free some space." if error.errno in NO_ROOM else problem
            message = f"{error.filename}: {problem}" if error.filename else problem
        elif isinstance(error, MemoryError):
            message = "out of memory. Raise the limit of this process (ulimit -v), or use a machine with more memory."
        elif not isinstance(error, InputError | DataError | CheckpointError | SaveError):
            raise
        for line in message.splitlines():
            notify(f"manta: {line}")
        sys.exit(ExitCode.USAGE if isinstance(error, InputError) else ExitCode.FAILED)
    finally:
        flush_standard_streams()
