"""The commands of `manta data`. Each imports what it needs when it runs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from manta.cluster.protocol import ExitCode
from manta.data.errors import InputError

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="What is in the data: a corpus, its files, its mixture, the text of a step."
)

Where = Annotated[Path, typer.Argument(metavar="FILE|RUN", help="A config, in YAML, or a run directory.", show_default=False)]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Laid over the config: data.packing=best_fit", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Png = Annotated[Path | None, typer.Option("--png", metavar="DIR", help="Draw pictures into this directory, too.", show_default=False)]


@app.command(epilog="For example: manta data inspect run.yaml data.sequence_length=4096 --png pictures")
def inspect(
    where: Where,
    overrides: Overrides = None,
    *,
    read: Annotated[int, typer.Option(min=0, help="Tokens to read for duplicates and overlaps, at most; 0 reads none.")] = 2_000_000_000,
    png: Png = None,
    as_json: AsJson = False,
) -> None:
    """What a prepared corpus is made of.

    Documents, tokens and lengths by source; what cutting or packing makes of them; duplicates; validation text that train has, too.
    """
    from manta.launch.inspect import corpus, corpus_report
    from manta.launch.inspect.resolve import opened

    told = corpus.inspect(opened(where, overrides or []), read=read, png=png)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        corpus_report.show(told)


@app.command(epilog="For example: manta data verify runs/mine")
def verify(where: Where, overrides: Overrides = None, *, as_json: AsJson = False) -> None:
    """Read every byte of a prepared corpus, and tell of all that is damaged.

    Hashes, the counts of documents and tokens, and each id. Exit code 2 where anything is damaged.
    """
    from manta.launch.inspect import verify
    from manta.launch.inspect.resolve import opened

    told = verify.check(opened(where, overrides or []))
    if as_json:
        typer.echo(json.dumps(told))
    elif not told["damaged"]:
        verify.show(told)
    if told["damaged"]:
        raise InputError("\n".join(told["damaged"]))


@app.command(epilog="For example: manta data mixture run.yaml --steps 100000")
def mixture(
    where: Where,
    overrides: Overrides = None,
    *,
    steps: Annotated[int | None, typer.Option(min=1, help="How far; train.steps where not given.", show_default=False)] = None,
    png: Png = None,
    as_json: AsJson = False,
) -> None:
    """Which source gives how many tokens and epochs by when.

    Says, too, from which step on a source is read again, or more often than its epochs allow.
    """
    from manta.launch.inspect import mixture
    from manta.launch.inspect.resolve import opened

    told = mixture.mixture(opened(where, overrides or []), steps=steps, png=png)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        mixture.show(told)


@app.command("sample-at", epilog="For example: manta data sample-at runs/mine 1731 --rank 3")
def sample_at(
    run: Run,
    step: Annotated[int, typer.Argument(metavar="STEP", help="As metrics.jsonl counts: the first is 1.", show_default=False)],
    *,
    slot: Annotated[int | None, typer.Option(min=0, help="That sample of the step alone.", show_default=False)] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="The samples of that data rank alone.", show_default=False)] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Deal the step out over so many data ranks.", show_default=False)] = None,
    full: Annotated[bool, typer.Option("--full", help="Long samples are not shortened.")] = False,
    as_json: AsJson = False,
) -> None:
    """The very text that a step was trained on.

    By data rank, turn and slot: source, epoch, documents, special tokens, what was masked, padding. The digest that the run logged proves
    it; exit code 1 where it is another one. Did the loss jump there? A new run leaves samples out by the numbers told here:
    data.skip=[[FIRST,END]].
    """
    from manta.launch.inspect import sample_at as of_step

    told = of_step.sample_at(run, step, slot=slot, rank=rank, ranks=ranks)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        of_step.show(told, full=full)
    if told["digest"]["matches"] is False:
        raise typer.Exit(ExitCode.FAILED)
