"""`manta list`, `goodput`, `report` and `compare`: what runs have achieved."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from manta.launch.inspect.charts import bar, console, grid, percent
from manta.launch.terminal import AsJson, Run, notify, print_report, user_path, user_paths

app = typer.Typer()

Output = Annotated[Path | None, typer.Option(metavar="FILE", help="The file to write; default: RUN/report.html.", callback=user_path)]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Also write a report with the curves of all runs.", callback=user_path)
]
AllRuns = Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run directories.", callback=user_paths)]
Runs = Annotated[Path, typer.Argument(metavar="DIR", help="A directory with runs below it.", callback=user_path)]


@app.command("list", epilog="For example: manta list runs")
def list_(directory: Runs = Path("runs"), *, as_json: AsJson = False) -> None:
    """List all runs below a directory: state, step, losses, tokens per second, and bytes on disk."""
    from manta.launch.control.list import list_runs, print_runs

    print_report(list_runs(directory), print_runs, as_json=as_json)


@app.command(epilog="For example: manta goodput runs/mine")
def goodput(run: Run, *, as_json: AsJson = False) -> None:
    """Print where the time of a run went: each second since its first start, in one category."""
    from manta.cluster.supervise.event_log import read_events
    from manta.launch.config import find_run
    from manta.launch.goodput import goodput
    from manta.trainer.metrics import energy, read_all_metrics

    run_dir = find_run(run)
    now, lines = time.time() if run_dir.is_locked else None, read_all_metrics(run_dir.metrics_file)
    found = goodput(read_events(run_dir.events_file), lines, now=now)
    seconds = {category.value: round(value, 3) for category, value in found.seconds.items()}
    report = {"run": str(run_dir.path), "total": round(found.total, 3), "goodput": round(found.share, 5), "seconds": seconds}
    report |= energy(lines)
    print_report(report, show_goodput, as_json=as_json)


def show_goodput(report: dict[str, Any]) -> None:
    from manta.trainer.metrics import format_duration, format_energy

    total = report["total"] or 1.0
    table = grid(4)
    for category, seconds in report["seconds"].items():
        table.add_row(category, format_duration(seconds), percent(seconds / total), bar(seconds / total, 40))
    out = console()
    out.print(f"goodput {percent(report['goodput'])} of {format_duration(report['total'])} since the first start")
    out.print(table)
    for name, text in format_energy(report).items():
        out.print(f"{name} {text}")


@app.command(epilog="For example: manta report runs/mine --samples 2")
def report(
    run: Run,
    *,
    output: Output = None,
    samples: Annotated[int, typer.Option(min=0, max=20, help="Texts to generate with the newest checkpoint, with seeds 1, 2, ...")] = 0,
    prompt: Annotated[str, typer.Option(help="The text that they continue.")] = "",
) -> None:
    """Write a report of a run: one HTML file with curves, goodput, events, config and manifest. A run writes it when it ends."""
    from manta.launch.config import find_run
    from manta.launch.report.html import write_report
    from manta.launch.report.texts import SECONDS, add_texts

    run_dir = find_run(run)
    problem = add_texts(run_dir, samples, prompt=prompt, seconds=samples * SECONDS) if samples else None
    if problem:
        notify(f"texts are missing: {problem}")
    typer.echo(str(write_report(run, output, problem=problem or "")))


@app.command(epilog="For example: manta compare runs/a runs/b --html compare.html")
def compare(
    runs: AllRuns,
    *,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: how their configs and results differ, the first step at which they do, and why."""
    from manta.data.storage.atomic import write_atomically
    from manta.launch.report.compare import compare, show
    from manta.launch.report.html import render
    from manta.launch.report.series import read_runs

    records = read_runs(runs)
    found = compare(records)
    print_report(found, show, as_json=as_json)
    if html is not None:
        write_atomically(html, render(records, comparison=found))
