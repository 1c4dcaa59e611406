"""What `manta data inspect` prints."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from manta.launch.inspect.charts import bar, console, percent, swatch, visible

Told = dict[str, Any]
_BAR = 26  # letters
_SNIPPET = 80  # of a document that stands several times


def show(told: Told) -> None:
    out = console()
    out.print(_sources(told))
    for source in told["sources"]:
        if source["left_out"]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in source["left_out"].items())
            out.print(f"left out of {source['source']}: {reasons}", soft_wrap=True)
    out.print()
    out.print(_histogram(told))
    out.print()
    out.print(_ways(told))
    if told["steps_per_epoch"] is not None:
        out.print(_epochs(told))
    else:
        out.print("mixed sources have epochs of their own: manta data mixture tells them")
    if "duplicates" in told:
        out.print()
        _show_repeated(out, told)
    for path in told.get("png", ()):
        out.print(f"drawn: {path}", soft_wrap=True)


def _sources(told: Told) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in ("source", "documents", "tokens", "share", "", "text", "bytes/token", "held out"):
        table.add_column(name, justify="left" if name in {"source", "", "held out"} else "right")
    for index, source in enumerate(told["sources"]):
        drawn = Text(bar(source["share"], 16), style=swatch(index).style)
        table.add_row(source["source"], *_counts(source), percent(source["share"]), drawn, *_text(source), _held_out(source))
    if len(told["sources"]) > 1:
        table.add_row("all", *_counts(told["all"]), "", "", *_text(told["all"]), _held_out(told["all"]), style="bold")
    return table


def _counts(source: Told) -> tuple[str, str]:
    return f"{source['documents']:,}", f"{source['tokens']:,}"


def _text(source: Told) -> tuple[str, str]:
    if source["text_bytes"] is None:
        return "?", "?"
    return f"{source['text_bytes'] / 1e6:,.1f} MB", f"{source['bytes_per_token']:.2f}"


def _held_out(source: Told) -> str:
    return f"{source['validation']['tokens']:,} tokens of {source['validation']['documents']:,}"


def _histogram(told: Told) -> Table:
    length = told["packing"]["sequence_length"]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("tokens each", justify="right", no_wrap=True)
    for name in ("documents", "tokens"):
        table.add_column(name, justify="right")
        table.add_column("", width=_BAR)
    table.add_column("")
    rows = told["lengths"]
    sums = {name: max(sum(row[name] for row in rows), 1) for name in ("documents", "tokens")}
    highest = {name: max((row[name] / sums[name] for row in rows), default=1) for name in sums}
    for row in rows:
        cells: list[str] = []
        for name, total in sums.items():
            share = row[name] / total
            cells += [percent(share), bar(share / highest[name], _BAR)]
        here = "◂ a sample" if row["from"] <= length < row["below"] else ""
        ends = f"{row['from']:,}" if row["below"] - row["from"] == 1 else f"{row['from']:,} to {row['below'] - 1:,}"
        table.add_row(ends, *cells, here)
    return table


def _ways(told: Told) -> Table:
    packing = told["packing"]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in (f"data.packing at {packing['sequence_length']:,}", "samples an epoch", "documents cut", "", "padding", ""):
        table.add_column(name, justify="right" if name and "data" not in name else "left")
    for way in ("cut", "best_fit"):
        if (found := packing[way]) is not None:
            name = f"{way} (as configured)" if way == packing["configured"] else way
            cells = [(percent(found[key]), bar(found[key], 16)) for key in ("share_cut", "share_padding")]
            table.add_row(name, f"{found['samples']:,}", *cells[0], *cells[1])
    return table


def _epochs(told: Told) -> str:
    each, train = told["steps_per_epoch"], told["train"]
    if train["batch_ramp"]:
        return f"an epoch is {each:,.1f} steps of {train['global_batch']:,} samples, once the batch has grown to that"
    of_run = f"train.steps {train['steps']:,} are {train['steps'] / each:.2g} epochs"
    return f"an epoch is {each:,.1f} steps of {train['global_batch']:,} samples; {of_run}"


def _show_repeated(out: Console, told: Told) -> None:
    found, shared = told["duplicates"], told["overlap"]
    of = f"{found['documents_compared']:,} documents" + ("" if found["all_compared"] else " compared")
    remedy = "; to leave them out, of each source by itself: filter: {dedup: true}" if found["documents"] else ""
    out.print(
        f"duplicates: {found['documents']:,} of {of} ({percent(found['share_of_documents'])}) repeat an earlier one word for word,"
        f" {percent(found['share_of_tokens'])} of tokens{remedy}",
        soft_wrap=True,
    )
    for one in found["most"]:
        text = visible(" ".join(one["text"].split()))
        cut = f"{text[:_SNIPPET]}…" if len(text) > _SNIPPET else text
        out.print(f"  {one['count']:,} times {one['tokens']:,} tokens: {cut}", no_wrap=True, overflow="ellipsis")
    spans = f"{percent(shared['share_of_tokens'])} in spans of {shared['span']} or more that train has"
    out.print(
        f"validation in train: {shared['documents']:,} of {shared['validation_documents_compared']:,} documents word for word;"
        f" of {shared['validation_tokens_searched_for']:,} tokens {spans}",
        soft_wrap=True,
    )
    if not found["all_compared"]:
        out.print("  sampled: documents of some lengths only were compared, all documents of each; --read says how many tokens")
    if not shared["all_searched_for"]:
        out.print(f"  sampled: {shared['validation_tokens_searched_for']:,} validation tokens, in runs spread over all, were searched for")
    if not shared["all_searched"]:
        out.print(f"  sampled: {shared['train_tokens_searched']:,} train tokens were searched; more may be found in the others")
    speeds = (found["tokens_compared"] / found["seconds"], shared["train_tokens_searched"] / shared["seconds"])
    out.print(f"  read at {speeds[0] / 1e6:,.0f} Mtok/s for documents, {speeds[1] / 1e6:,.0f} Mtok/s for spans")
