"""`manta data inspect`: the contents of a corpus, the effect of packing, duplicates and contamination."""

import operator
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from manta.data.objectives.objective import window_shape
from manta.data.prepare.contamination import SPAN, find_contamination
from manta.data.prepare.dedup import find_duplicates
from manta.data.prepare.progress import progress
from manta.data.sampling.statistics import CorpusStatistics, LengthHistogram, PackingStatistics, corpus_statistics
from manta.data.shards.manifest import Manifest, load_corpora
from manta.data.shards.windows import TokenStream
from manta.data.tokenizer.tokenizer import Tokenizer
from manta.launch.inspect.charts import bar, color, console, number_column, percent, plain_table, visible
from manta.launch.inspect.resolve import DataTarget
from manta.launch.terminal import count_text

Report = dict[str, Any]
_MAX_DECODED = 10_000  # tokens of a repeated document
_LEAST_PROGRESS = 50_000_000  # tokens; a smaller corpus is read too quickly for a progress bar
_BAR = 26  # characters
_SNIPPET = 80  # characters of a repeated document


def inspect_corpus(target: DataTarget, *, read: int, png: Path | None) -> Report:
    """Return all figures. read: maximum number of tokens to read for duplicates and for contamination; 0 skips both."""
    config, prepared = target.config, target.prepared()
    data, train = config.data, config.train
    opened = load_corpora(prepared, data.cache)
    corpora = [corpus for _, corpus in opened]
    shape, by_shard = window_shape(data), data.shuffle_shards is not None
    found = [corpus_statistics(home, corpus, shape, apart=by_shard) for home, corpus in opened]
    total, whole = _totals(corpora), reduce(operator.add, found)
    has_packing = data.objective == "causal" or data.pairs == "none"  # the parts of pairs are cut from running text
    packing: Report = {"configured": data.packing, "sequence_length": data.sequence_length, **_packing(whole)}
    sources: list[Report] = [
        {
            "source": corpus.source,
            **_totals([corpus]),
            "share": corpus.train.tokens / max(total["tokens"], 1),
            "lengths": _lengths(one.lengths),
            "packing": _packing(one),
        }
        for corpus, one in zip(corpora, found, strict=True)
    ]
    report: Report = {
        "corpora": [home.root for home, _ in opened],
        "tokenizer": {"file": str(prepared.tokenizer), "vocabulary": max(corpus.vocabulary for corpus in corpora)},
        "sources": sources,
        "all": total,
        "lengths": _lengths(whole.lengths),
        "packing": packing if has_packing else packing | {"best_fit": None},
        "mixed": bool(data.mixture),
        # Each source of a mixture has its own epochs.
        "steps_per_epoch": None if data.mixture else packing[data.packing]["samples"] / train.global_batch,
        "train": {"steps": train.steps, "global_batch": train.global_batch, "batch_ramp": bool(train.batch_ramp)},
    }
    if read:
        streams = [TokenStream(home, corpus.train.shards) for home, corpus in opened]
        validation = [TokenStream(home, corpus.validation.shards) for home, corpus in opened]
        tokenizer = Tokenizer(prepared.tokenizer, end_of_text=config.tokenizer.end_of_text)
        report |= _repetition(streams, validation, tokenizer, max_tokens=read)
    if png is not None:
        from manta.launch.inspect.figures import write_corpus

        by_source = {corpus.source: one.lengths for corpus, one in zip(corpora, found, strict=True)}
        report["png"] = write_corpus(png, sources, by_source, data)
    return report


def _totals(corpora: Sequence[Manifest]) -> Report:
    """Return counts of the train documents, and of the validation documents. Sources of token ids have an unknown text size."""
    train, validation = [corpus.train for corpus in corpora], [corpus.validation for corpus in corpora]
    with_text = [split for split in train if split.text_bytes]
    text_bytes = sum(split.text_bytes for split in with_text) or None
    return {
        "documents": sum(split.documents for split in train),
        "tokens": sum(split.tokens for split in train),
        "text_bytes": text_bytes,
        "bytes_per_token": text_bytes and text_bytes / max(sum(split.tokens for split in with_text), 1),
        "left_out": dict(sum((Counter(corpus.left_out) for corpus in corpora), Counter[str]())),
        "validation": {
            "documents": sum(split.documents for split in validation),
            "tokens": sum(split.tokens for split in validation),
            "text_bytes": sum(split.text_bytes for split in validation) or None,
        },
    }


def _lengths(lengths: LengthHistogram) -> list[Report]:
    octaves = lengths.by_octave()
    edges = octaves.edges.tolist()
    rows = zip(edges[:-1], edges[1:], octaves.documents.tolist(), octaves.tokens.tolist(), strict=True)
    return [{"from": first, "below": end, "documents": documents, "tokens": tokens} for first, end, documents, tokens in rows]


def _packing(found: CorpusStatistics) -> Report:
    documents = max(int(found.lengths.documents.sum()), 1)

    def report(packing: PackingStatistics) -> Report:
        return {
            "samples": packing.samples,
            "documents_cut": packing.cut,
            "share_cut": packing.cut / documents,
            "padding": packing.padding,
            "share_padding": packing.padding / max(packing.places, 1),
        }

    return {"cut": report(found.cut), "best_fit": report(found.best_fit)}


def _repetition(train: list[TokenStream], validation: list[TokenStream], tokenizer: Tokenizer, *, max_tokens: int) -> Report:
    tokens, validation_tokens = (sum(stream.tokens for stream in streams) for streams in (train, validation))
    both = validation_tokens + 2 * tokens
    width = max(np.dtype(shard.dtype).itemsize for stream in train for shard in stream.shards)
    with progress("inspect", min(both, 2 * max_tokens) * width) as advance:

        def advance_tokens(count: int) -> None:
            if both >= _LEAST_PROGRESS:
                advance(count * width)

        duplicates = find_duplicates(train, validation, max_tokens=max_tokens, advance=advance_tokens)
        contamination = find_contamination(train, validation, max_tokens=max_tokens, advance=advance_tokens)
    compared, compared_tokens, repeated_tokens = sum(duplicates.documents), sum(duplicates.tokens), sum(duplicates.repeated_tokens)
    searched_for, found = sum(contamination.searched_for), sum(contamination.found)
    by_source = zip(duplicates.validation_in_train, contamination.found, contamination.searched_for, strict=True)
    return {
        "duplicates": {
            "documents_compared": compared,
            "tokens_compared": compared_tokens,
            "documents": sum(duplicates.repeated),
            "share_of_documents": sum(duplicates.repeated) / max(compared, 1),
            "tokens": repeated_tokens,
            "share_of_tokens": repeated_tokens / max(compared_tokens, 1),
            "by_source": list(duplicates.repeated),
            "most": [
                {"count": count, "tokens": len(ids), "text": tokenizer.decode(ids[:_MAX_DECODED].tolist())}
                for count, ids in duplicates.most_frequent
            ],
            "all_compared": compared_tokens == tokens,
        },
        "overlap": {
            "validation_documents_compared": sum(duplicates.validation_documents),
            "documents": sum(duplicates.validation_in_train),
            "span": SPAN,
            "validation_tokens_searched_for": searched_for,
            "train_tokens_searched": contamination.searched,
            "tokens": found,
            "share_of_tokens": found / max(searched_for, 1),
            "by_source": [
                {"documents": documents, "tokens": tokens, "share_of_tokens": tokens / max(total, 1)}
                for documents, tokens, total in by_source
            ],
            "all_searched": contamination.searched == tokens,
            "all_searched_for": searched_for == validation_tokens,
        },
    }


def show(report: Report) -> None:
    out = console()
    out.print(_sources(report))
    for source in report["sources"]:
        if source["left_out"]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in source["left_out"].items())
            out.print(f"excluded from {source['source']}: {reasons}")
    for table in (_histogram(report), _packing_table(report["packing"])):
        out.print()
        out.print(table)
    out.print(_epochs(report["steps_per_epoch"], report["train"]))
    if "duplicates" in report:
        out.print()
        _show_repetition(out, report["duplicates"], report["overlap"])
    for path in report.get("png", ()):
        out.print(f"wrote {path}")


def _sources(report: Report) -> Table:
    table = plain_table(Column("source"), "documents", "tokens", "share", Column(), "text", "bytes/token", Column("validation"))
    total: Report = {"source": "all", **report["all"]}
    sources: list[Report] = report["sources"]
    for index, source in enumerate(sources if len(sources) == 1 else [*sources, total]):
        share, text_bytes, validation = source.get("share"), source["text_bytes"], source["validation"]
        shares = ("", "") if share is None else (percent(share), Text(bar(share, 16), style=color(index)))
        text = ("?", "?") if text_bytes is None else (decimal(text_bytes), f"{source['bytes_per_token']:.2f}")
        counts = f"{source['documents']:,}", f"{source['tokens']:,}"
        held_out = f"{validation['tokens']:,} tokens in {count_text(validation['documents'], 'document')}"
        table.add_row(source["source"], *counts, *shares, *text, held_out, style="bold" if share is None else None)
    return table


def _histogram(report: Report) -> Table:
    length, rows = report["packing"]["sequence_length"], report["lengths"]
    table = plain_table(number_column("document length"), "documents", Column(width=_BAR), "tokens", Column(width=_BAR), Column())
    totals = {name: max(sum(row[name] for row in rows), 1) for name in ("documents", "tokens")}
    highest = {name: max((row[name] / total for row in rows), default=1) for name, total in totals.items()}
    for row in rows:
        shares = {name: row[name] / total for name, total in totals.items()}
        cells = [cell for name, share in shares.items() for cell in (percent(share), bar(share / highest[name], _BAR))]
        bounds = f"{row['from']:,}" if row["below"] - row["from"] == 1 else f"{row['from']:,} to {row['below'] - 1:,}"
        table.add_row(bounds, *cells, "◂ sequence length" if row["from"] <= length < row["below"] else "")
    return table


def _packing_table(packing: Report) -> Table:
    title = Column(f"data.packing at {packing['sequence_length']:,}")
    table = plain_table(title, "samples per epoch", "documents cut", Column(), "padding", Column())
    for name in ("cut", "best_fit"):
        if (found := packing[name]) is not None:
            label = f"{name} (as configured)" if name == packing["configured"] else name
            cells = [cell for key in ("share_cut", "share_padding") for cell in (percent(found[key]), bar(found[key], 16))]
            table.add_row(label, f"{found['samples']:,}", *cells)
    return table


def _epochs(steps_per_epoch: float | None, train: Report) -> str:
    if steps_per_epoch is None:
        return "an epoch here is one pass over all sources; in a mixture, each source has its own: see manta data mixture"
    epoch = f"an epoch is {steps_per_epoch:,.1f} steps of {train['global_batch']:,} samples"
    if train["batch_ramp"]:
        return f"{epoch}, once the batch has grown to that"
    return f"{epoch}; train.steps {train['steps']:,} are {train['steps'] / steps_per_epoch:.2g} epochs"


def _show_repetition(out: Console, found: Report, overlap: Report) -> None:
    total = f"{found['documents_compared']:,} documents" + ("" if found["all_compared"] else " compared")
    remedy = "; to remove them within each source: filter: {dedup: true}" if found["documents"] else ""
    out.print(
        f"duplicates: {found['documents']:,} of {total} ({percent(found['share_of_documents'])}) are identical to an earlier one,"
        f" {percent(found['share_of_tokens'])} of tokens{remedy}"
    )
    for one in found["most"]:
        text = visible(" ".join(one["text"].split()))
        snippet = f"{text[:_SNIPPET]}…" if len(text) > _SNIPPET else text
        out.print(f"  {one['count']:,} copies of {one['tokens']:,} tokens: {snippet}", no_wrap=True, overflow="ellipsis", soft_wrap=False)
    out.print(
        f"validation in train: {overlap['documents']:,} of {overlap['validation_documents_compared']:,} documents are identical;"
        f" {percent(overlap['share_of_tokens'])} of {overlap['validation_tokens_searched_for']:,} tokens are in spans of"
        f" {overlap['span']} or more that also occur in the training text"
    )
    if not found["all_compared"]:
        out.print("  sampled: all documents of some lengths were compared; --read sets how many tokens")
    if not overlap["all_searched_for"]:
        out.print(f"  sampled: {overlap['validation_tokens_searched_for']:,} validation tokens were searched for, in runs spread over all")
    if not overlap["all_searched"]:
        out.print(f"  sampled: {overlap['train_tokens_searched']:,} train tokens were searched; the others may have more")
