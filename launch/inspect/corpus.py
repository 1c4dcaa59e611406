"""`manta data inspect`: what a corpus is made of, what windows make of it, and what stands in it more than once."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from manta.data.objectives.objective import window_shape
from manta.data.prepare.contamination import SPAN, Contamination, find_contamination
from manta.data.prepare.dedup import Duplicates, find_duplicates
from manta.data.prepare.progress import progress
from manta.data.sampling.windows import TokenStream
from manta.data.shards import manifest
from manta.data.shards.manifest import Manifest
from manta.data.shards.statistics import Contents, Lengths, Packing, contents
from manta.data.tokenizer.tokenizer import Tokenizer
from manta.launch.inspect.resolve import Opened

Told = dict[str, Any]
_ROOM = 10_000  # tokens of it that are decoded, at most
_SILENT = 50_000_000  # tokens, below which nobody waits to be told how far the reading is


def inspect(opened: Opened, *, read: int, png: Path | None) -> Told:
    """All figures, as JSON has them. read: tokens that are read to find duplicates and overlaps, each; 0 finds none."""
    config, prepared = opened.config, opened.prepared()
    corpora = manifest.load_checked(prepared, config.data.cache)
    shape, apart = window_shape(config.data), config.data.shuffle_shards is not None
    found = [contents(home, corpus, shape, apart=apart) for home, corpus in corpora]
    total = sum((one.lengths for one in found[1:]), start=found[0].lengths)
    tokens = sum(corpus.train.tokens for _, corpus in corpora)
    told: Told = {
        "corpora": [home.root for home, _ in corpora],
        "tokenizer": {"file": str(prepared.tokenizer), "vocabulary": max(corpus.vocabulary for _, corpus in corpora)},
        "sources": [_source(corpus, one, tokens) for (_, corpus), one in zip(corpora, found, strict=True)],
        "all": _all([corpus for _, corpus in corpora]),
        "lengths": _lengths(total),
        "packing": {
            "configured": config.data.packing,
            "sequence_length": config.data.sequence_length,
            "cut": _packing(sum((one.cut for one in found[1:]), start=found[0].cut), total),
            # A pair's parts are cut from running text: nothing is packed there.
            "best_fit": None
            if config.data.objective == "masked" and config.data.pairs != "none"
            else _packing(sum((one.best_fit for one in found[1:]), start=found[0].best_fit), total),
        },
        "mixed": bool(config.data.mixture),
        "steps_per_epoch": None,
    }
    if not config.data.mixture:  # else each source has epochs of its own
        told["steps_per_epoch"] = told["packing"][config.data.packing]["samples"] / config.train.global_batch
    told["train"] = {"steps": config.train.steps, "global_batch": config.train.global_batch, "batch_ramp": bool(config.train.batch_ramp)}
    if read:
        train = [TokenStream(home, corpus.train.shards) for home, corpus in corpora]
        held_out = [TokenStream(home, corpus.validation.shards) for home, corpus in corpora]
        tokenizer = Tokenizer(prepared.tokenizer, end_of_text=config.tokenizer.end_of_text)
        told |= _repeated(train, held_out, tokenizer, read=read)
    if png is not None:
        from manta.launch.inspect import figures

        names = [source["source"] for source in told["sources"]]
        told["png"] = figures.corpus(png, told["sources"], dict(zip(names, (one.lengths for one in found), strict=True)), config.data)
    return told


def _source(corpus: Manifest, found: Contents, tokens: int) -> Told:
    return {
        "source": corpus.source,
        **_split(corpus),
        "share": corpus.train.tokens / max(tokens, 1),
        "left_out": corpus.left_out,
        "lengths": _lengths(found.lengths),
        "packing": {"cut": _packing(found.cut, found.lengths), "best_fit": _packing(found.best_fit, found.lengths)},
    }


def _split(corpus: Manifest) -> Told:
    train, held_out = corpus.train, corpus.validation
    written = train.text_bytes or None  # of ids that came as ids nobody knows the text
    return {
        "documents": train.documents,
        "tokens": train.tokens,
        "text_bytes": written,
        "bytes_per_token": None if written is None else written / max(train.tokens, 1),
        "validation": {"documents": held_out.documents, "tokens": held_out.tokens, "text_bytes": held_out.text_bytes or None},
    }


def _all(corpora: list[Manifest]) -> Told:
    known = [corpus for corpus in corpora if corpus.train.text_bytes]
    written, tokens = sum(corpus.train.text_bytes for corpus in known), sum(corpus.train.tokens for corpus in known)
    left_out: dict[str, int] = {}
    for corpus in corpora:
        for reason, count in corpus.left_out.items():
            left_out[reason] = left_out.get(reason, 0) + count
    return {
        "documents": sum(corpus.train.documents for corpus in corpora),
        "tokens": sum(corpus.train.tokens for corpus in corpora),
        "text_bytes": written if known else None,
        "bytes_per_token": written / tokens if known else None,
        "left_out": left_out,
        "validation": {
            "documents": sum(corpus.validation.documents for corpus in corpora),
            "tokens": sum(corpus.validation.tokens for corpus in corpora),
        },
    }


def _lengths(lengths: Lengths) -> list[Told]:
    drawn = lengths.by_octave()
    edges = drawn.edges.tolist()
    rows = zip(edges[:-1], edges[1:], drawn.documents.tolist(), drawn.tokens.tolist(), strict=True)
    return [{"from": first, "below": end, "documents": documents, "tokens": tokens} for first, end, documents, tokens in rows]


def _packing(packing: Packing, lengths: Lengths) -> Told:
    return {
        "samples": packing.samples,
        "documents_cut": packing.cut,
        "share_cut": packing.cut / max(int(lengths.documents.sum()), 1),
        "padding": packing.padding,
        "share_padding": packing.padding / max(packing.places, 1),
    }


def _repeated(train: list[TokenStream], held_out: list[TokenStream], tokenizer: Tokenizer, *, read: int) -> Told:
    tokens = sum(int(stream.starts[-1]) for stream in train)
    both = sum(int(stream.starts[-1]) for stream in held_out) + 2 * tokens
    width = max(np.dtype(shard.dtype).itemsize for stream in train for shard in stream.shards)
    begun = time.perf_counter()
    with progress("inspect", min(both, 2 * read) * width) as advance:

        def tell(new: int) -> None:
            if both >= _SILENT:
                advance(new * width)

        repeated = find_duplicates(train, held_out, max_tokens=read, advance=tell)
        between = time.perf_counter()
        shared = find_contamination(train, held_out, max_tokens=read, advance=tell)
    compared, searched_for = sum(repeated.tokens), sum(shared.searched_for)
    return {
        "duplicates": _duplicates(repeated, tokenizer) | {"seconds": between - begun, "all_compared": compared == tokens},
        "overlap": _overlap(repeated, shared)
        | {
            "seconds": time.perf_counter() - between,
            "all_searched": shared.searched == tokens,
            "all_searched_for": searched_for == sum(int(stream.starts[-1]) for stream in held_out),
        },
    }


def _duplicates(found: Duplicates, tokenizer: Tokenizer) -> Told:
    documents, tokens = sum(found.documents), sum(found.tokens)
    return {
        "documents_compared": documents,
        "tokens_compared": tokens,
        "documents": sum(found.repeated),
        "share_of_documents": sum(found.repeated) / max(documents, 1),
        "tokens": sum(found.repeated_tokens),
        "share_of_tokens": sum(found.repeated_tokens) / max(tokens, 1),
        "by_source": list(found.repeated),
        "most": [
            {"count": one.count, "tokens": len(one.tokens), "text": tokenizer.decode(one.tokens[:_ROOM].tolist())}
            for one in found.most_frequent
        ],
    }


def _overlap(found: Duplicates, shared: Contamination) -> Told:
    return {
        "validation_documents_compared": sum(found.validation_documents),
        "documents": sum(found.validation_in_train),
        "span": SPAN,
        "validation_tokens_searched_for": sum(shared.searched_for),
        "train_tokens_searched": shared.searched,
        "tokens": sum(shared.found),
        "share_of_tokens": sum(shared.found) / max(sum(shared.searched_for), 1),
        "by_source": [
            {"documents": documents, "tokens": tokens, "share_of_tokens": tokens / max(of, 1)}
            for documents, tokens, of in zip(found.validation_in_train, shared.found, shared.searched_for, strict=True)
        ],
    }
