"""The commands of `manta data`. Each imports what it needs when it runs."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from manta.cluster.protocol import ExitCode
from manta.data.errors import InputError
from manta.launch.terminal import AsJson, Overrides, Run, print_report, user_path

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Inspect the data: a corpus, its files, its mixture, the text of a step."
)


def _require_matplotlib(param: typer.CallbackParam, directory: Path | None) -> Path | None:
    if directory is not None and find_spec("matplotlib") is None:
        raise InputError("--png: expected matplotlib, which is not installed. Run pip install 'manta[plots]'.")
    return user_path(param, directory)


Target = Annotated[Path, typer.Argument(metavar="FILE|RUN", help="A config in YAML, or a run directory.", callback=user_path)]
Png = Annotated[Path | None, typer.Option(metavar="DIR", help="Also write charts as PNG here.", callback=_require_matplotlib)]


@app.command(epilog="For example: manta data inspect run.yaml --png charts")
def inspect(
    target: Target,
    overrides: Overrides = None,
    *,
    read: Annotated[int, typer.Option(min=0, help="Most tokens to read for duplicates and contamination; 0: none.")] = 2_000_000_000,
    png: Png = None,
    as_json: AsJson = False,
) -> None:
    """Describe a prepared corpus.

    Documents, tokens and lengths by source; the effect of cutting or packing; duplicates; validation text that is also in train.
    """
    from manta.launch.inspect.corpus import inspect_corpus, show
    from manta.launch.inspect.resolve import resolve

    print_report(inspect_corpus(resolve(target, overrides or []), read=read, png=png), show, as_json=as_json)


@app.command(epilog="For example: manta data verify runs/mine")
def verify(target: Target, overrides: Overrides = None, *, as_json: AsJson = False) -> None:
    """Read every byte of a prepared corpus, and report all damage.

    Checks hashes, the counts of documents and tokens, and each token id. Exits with 2 if anything is damaged.
    """
    from manta.launch.inspect.resolve import resolve
    from manta.launch.inspect.verify import check, show

    report = check(resolve(target, overrides or []))
    if as_json or not report["damaged"]:
        print_report(report, show, as_json=as_json)
    if report["damaged"]:
        raise InputError("\n".join(report["damaged"]))


@app.command(epilog="For example: manta data mixture run.yaml --steps 100000")
def mixture(
    target: Target,
    overrides: Overrides = None,
    *,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to cover; default: train.steps.")] = None,
    png: Png = None,
    as_json: AsJson = False,
) -> None:
    """Show the tokens and epochs of each source over the run.

    Also reports the step from which a source is repeated, or read more often than its epochs allow.
    """
    from manta.launch.inspect.mixture import mixture, show
    from manta.launch.inspect.resolve import resolve

    print_report(mixture(resolve(target, overrides or []), steps=steps, png=png), show, as_json=as_json)


@app.command("sample-at", epilog="For example: manta data sample-at runs/mine 1731 --rank 3")
def sample_at(
    run: Run,
    step: Annotated[int, typer.Argument(metavar="STEP", help="As in metrics.jsonl: the first is 1.")],
    *,
    slot: Annotated[int | None, typer.Option(min=0, help="Show only this sample of the step.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Show only this data rank's samples.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Distribute the step over this many data ranks.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Print long samples in full.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the text that a step was trained on.

    By data rank, micro step and slot: source, epoch, documents, special tokens, masked tokens, padding. It is verified by the digest that
    the run logged; exits with 1 if the digests differ. To exclude samples from a new run, for example after a loss spike, use the sample
    numbers in data.skip=[[FIRST,END]].
    """
    from manta.launch.inspect.sample_at import sample_at, show

    report = sample_at(run, step, slot=slot, rank=rank, ranks=ranks)
    print_report(report, partial(show, full=full), as_json=as_json)
    if report["digest"]["matches"] is False:
        raise typer.Exit(ExitCode.FAILED)
