"""The printed report of `manta data inspect`."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from manta.launch.inspect.charts import bar, color, console, percent, plain_table, visible

Report = dict[str, Any]
_BAR = 26  # characters
_SNIPPET = 80  # characters of a repeated document


def show(report: Report) -> None:
    out = console()
    out.print(_sources(report))
    for source in report["sources"]:
        if source["left_out"]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in source["left_out"].items())
            out.print(f"excluded from {source['source']}: {reasons}", soft_wrap=True)
    out.print()
    out.print(_histogram(report))
    out.print()
    out.print(_packing(report["packing"]))
    if report["steps_per_epoch"] is not None:
        out.print(_epochs(report["steps_per_epoch"], report["train"]))
    else:
        out.print("each source of a mixture has its own epochs: see manta data mixture")
    if "duplicates" in report:
        out.print()
        _show_repetition(out, report["duplicates"], report["overlap"])
    for path in report.get("png", ()):
        out.print(f"wrote {path}", soft_wrap=True)


def _sources(report: Report) -> Table:
    columns = ("source", "documents", "tokens", "share", "", "text", "bytes/token", "validation")
    table = plain_table(*columns, left=("source", "", "validation"))
    for index, source in enumerate(report["sources"]):
        chart = Text(bar(source["share"], 16), style=color(index))
        _add_source(table, source["source"], source, percent(source["share"]), chart)
    if len(report["sources"]) > 1:
        _add_source(table, "all", report["all"], "", "", style="bold")
    return table


def _add_source(table: Table, name: str, source: Report, share: str, chart: Text | str, *, style: str | None = None) -> None:
    has_text = source["text_bytes"] is not None
    text = (f"{source['text_bytes'] / 1e6:,.1f} MB", f"{source['bytes_per_token']:.2f}") if has_text else ("?", "?")
    validation = f"{source['validation']['tokens']:,} tokens of {source['validation']['documents']:,}"
    table.add_row(name, f"{source['documents']:,}", f"{source['tokens']:,}", share, chart, *text, validation, style=style)


def _histogram(report: Report) -> Table:
    length = report["packing"]["sequence_length"]
    table = plain_table()
    table.add_column("tokens each", justify="right", no_wrap=True)
    for name in ("documents", "tokens"):
        table.add_column(name, justify="right")
        table.add_column("", width=_BAR)
    table.add_column("")
    rows = report["lengths"]
    sums = {name: max(sum(row[name] for row in rows), 1) for name in ("documents", "tokens")}
    highest = {name: max((row[name] / sums[name] for row in rows), default=1) for name in sums}
    for row in rows:
        cells: list[str] = []
        for name, total in sums.items():
            share = row[name] / total
            cells += [percent(share), bar(share / highest[name], _BAR)]
        mark = "◂ a sample" if row["from"] <= length < row["below"] else ""
        bounds = f"{row['from']:,}" if row["below"] - row["from"] == 1 else f"{row['from']:,} to {row['below'] - 1:,}"
        table.add_row(bounds, *cells, mark)
    return table


def _packing(packing: Report) -> Table:
    title = f"data.packing at {packing['sequence_length']:,}"
    table = plain_table(title, "samples per epoch", "documents cut", "", "padding", "", left=(title, ""))
    for name in ("cut", "best_fit"):
        if (found := packing[name]) is not None:
            label = f"{name} (as configured)" if name == packing["configured"] else name
            cells = [cell for key in ("share_cut", "share_padding") for cell in (percent(found[key]), bar(found[key], 16))]
            table.add_row(label, f"{found['samples']:,}", *cells)
    return table


def _epochs(steps_per_epoch: float, train: Report) -> str:
    epoch = f"an epoch is {steps_per_epoch:,.1f} steps of {train['global_batch']:,} samples"
    if train["batch_ramp"]:
        return f"{epoch}, once the batch has grown to that"
    return f"{epoch}; train.steps {train['steps']:,} are {train['steps'] / steps_per_epoch:.2g} epochs"


def _show_repetition(out: Console, found: Report, overlap: Report) -> None:
    total = f"{found['documents_compared']:,} documents" + ("" if found["all_compared"] else " compared")
    remedy = "; to remove them within each source: filter: {dedup: true}" if found["documents"] else ""
    out.print(
        f"duplicates: {found['documents']:,} of {total} ({percent(found['share_of_documents'])}) are identical to an earlier one,"
        f" {percent(found['share_of_tokens'])} of tokens{remedy}",
        soft_wrap=True,
    )
    for one in found["most"]:
        text = visible(" ".join(one["text"].split()))
        snippet = f"{text[:_SNIPPET]}…" if len(text) > _SNIPPET else text
        out.print(f"  {one['count']:,} times {one['tokens']:,} tokens: {snippet}", no_wrap=True, overflow="ellipsis")
    out.print(
        f"validation in train: {overlap['documents']:,} of {overlap['validation_documents_compared']:,} documents are identical;"
        f" {percent(overlap['share_of_tokens'])} of {overlap['validation_tokens_searched_for']:,} tokens are in spans of"
        f" {overlap['span']} or more that train also has",
        soft_wrap=True,
    )
    if not found["all_compared"]:
        out.print("  sampled: all documents of some lengths were compared; --read sets how many tokens")
    if not overlap["all_searched_for"]:
        out.print(f"  sampled: {overlap['validation_tokens_searched_for']:,} validation tokens were searched for, in runs spread over all")
    if not overlap["all_searched"]:
        out.print(f"  sampled: {overlap['train_tokens_searched']:,} train tokens were searched; the others may have more")
    speeds = (found["tokens_compared"] / found["seconds"], overlap["train_tokens_searched"] / overlap["seconds"])
    out.print(f"  read at {speeds[0] / 1e6:,.0f} Mtok/s for documents, {speeds[1] / 1e6:,.0f} Mtok/s for spans")
