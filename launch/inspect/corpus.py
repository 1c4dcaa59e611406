"""`manta data inspect`: the contents of a corpus, the effect of packing, duplicates and contamination."""

import operator
import time
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from manta.data.objectives.objective import window_shape
from manta.data.prepare.contamination import SPAN, Contamination, find_contamination
from manta.data.prepare.dedup import Duplicates, find_duplicates
from manta.data.prepare.progress import progress
from manta.data.sampling.statistics import LengthHistogram, PackingStatistics, corpus_statistics
from manta.data.shards import manifest
from manta.data.shards.manifest import Manifest
from manta.data.shards.windows import TokenStream
from manta.data.tokenizer.tokenizer import Tokenizer
from manta.launch.inspect.resolve import DataTarget

Report = dict[str, Any]
_MAX_DECODED = 10_000  # tokens of a repeated document
_LEAST_PROGRESS = 50_000_000  # tokens; a smaller corpus is read too quickly for a progress bar


def inspect_corpus(target: DataTarget, *, read: int, png: Path | None) -> Report:
    """Return all figures. read: maximum number of tokens to read for duplicates and for contamination; 0 skips both."""
    config, prepared = target.config, target.prepared()
    data, train = config.data, config.train
    opened = manifest.load_corpora(prepared, data.cache)
    corpora = [corpus for _, corpus in opened]
    shape, by_shard = window_shape(data), data.shuffle_shards is not None
    found = [corpus_statistics(home, corpus, shape, apart=by_shard) for home, corpus in opened]
    lengths = reduce(operator.add, (one.lengths for one in found))
    total = _totals(corpora)
    has_packing = data.objective == "causal" or data.pairs == "none"  # the parts of pairs are cut from running text
    best_fit = _packing(reduce(operator.add, (one.best_fit for one in found)), lengths) if has_packing else None
    report: Report = {
        "corpora": [home.root for home, _ in opened],
        "tokenizer": {"file": str(prepared.tokenizer), "vocabulary": max(corpus.vocabulary for corpus in corpora)},
        "sources": [
            {
                "source": corpus.source,
                **_totals([corpus]),
                "share": corpus.train.tokens / max(total["tokens"], 1),
                "lengths": _lengths(one.lengths),
                "packing": {"cut": _packing(one.cut, one.lengths), "best_fit": _packing(one.best_fit, one.lengths)},
            }
            for corpus, one in zip(corpora, found, strict=True)
        ],
        "all": total,
        "lengths": _lengths(lengths),
        "packing": {
            "configured": data.packing,
            "sequence_length": data.sequence_length,
            "cut": _packing(reduce(operator.add, (one.cut for one in found)), lengths),
            "best_fit": best_fit,
        },
        "mixed": bool(data.mixture),
        "steps_per_epoch": None,
        "train": {"steps": train.steps, "global_batch": train.global_batch, "batch_ramp": bool(train.batch_ramp)},
    }
    if not data.mixture:  # each source of a mixture has its own epochs
        report["steps_per_epoch"] = report["packing"][data.packing]["samples"] / train.global_batch
    if read:
        streams = [TokenStream(home, corpus.train.shards) for home, corpus in opened]
        validation = [TokenStream(home, corpus.validation.shards) for home, corpus in opened]
        tokenizer = Tokenizer(prepared.tokenizer, end_of_text=config.tokenizer.end_of_text)
        report |= _repetition(streams, validation, tokenizer, max_tokens=read)
    if png is not None:
        from manta.launch.inspect.figures import write_corpus

        by_source = {corpus.source: one.lengths for corpus, one in zip(corpora, found, strict=True)}
        report["png"] = write_corpus(png, report["sources"], by_source, data)
    return report


def _totals(corpora: Sequence[Manifest]) -> Report:
    """Return counts of the train documents, and of the validation documents. Sources of token ids have an unknown text size."""
    with_text = [corpus.train for corpus in corpora if corpus.train.text_bytes]
    text_bytes = sum(split.text_bytes for split in with_text) or None
    excluded: Counter[str] = Counter()
    for corpus in corpora:
        excluded.update(corpus.left_out)
    return {
        "documents": sum(corpus.train.documents for corpus in corpora),
        "tokens": sum(corpus.train.tokens for corpus in corpora),
        "text_bytes": text_bytes,
        "bytes_per_token": text_bytes and text_bytes / max(sum(split.tokens for split in with_text), 1),
        "left_out": dict(excluded),
        "validation": {
            "documents": sum(corpus.validation.documents for corpus in corpora),
            "tokens": sum(corpus.validation.tokens for corpus in corpora),
            "text_bytes": sum(corpus.validation.text_bytes for corpus in corpora) or None,
        },
    }


def _lengths(lengths: LengthHistogram) -> list[Report]:
    octaves = lengths.by_octave()
    edges = octaves.edges.tolist()
    rows = zip(edges[:-1], edges[1:], octaves.documents.tolist(), octaves.tokens.tolist(), strict=True)
    return [{"from": first, "below": end, "documents": documents, "tokens": tokens} for first, end, documents, tokens in rows]


def _packing(packing: PackingStatistics, lengths: LengthHistogram) -> Report:
    return {
        "samples": packing.samples,
        "documents_cut": packing.cut,
        "share_cut": packing.cut / max(int(lengths.documents.sum()), 1),
        "padding": packing.padding,
        "share_padding": packing.padding / max(packing.places, 1),
    }


def _repetition(train: list[TokenStream], validation: list[TokenStream], tokenizer: Tokenizer, *, max_tokens: int) -> Report:
    tokens, validation_tokens = (sum(int(stream.starts[-1]) for stream in streams) for streams in (train, validation))
    both = validation_tokens + 2 * tokens
    width = max(np.dtype(shard.dtype).itemsize for stream in train for shard in stream.shards)
    start = time.perf_counter()
    with progress("inspect", min(both, 2 * max_tokens) * width) as advance:

        def advance_tokens(count: int) -> None:
            if both >= _LEAST_PROGRESS:
                advance(count * width)

        duplicates = find_duplicates(train, validation, max_tokens=max_tokens, advance=advance_tokens)
        between = time.perf_counter()
        contamination = find_contamination(train, validation, max_tokens=max_tokens, advance=advance_tokens)
    all_compared = sum(duplicates.tokens) == tokens
    all_searched, all_searched_for = contamination.searched == tokens, sum(contamination.searched_for) == validation_tokens
    return {
        "duplicates": _duplicates(duplicates, tokenizer) | {"seconds": between - start, "all_compared": all_compared},
        "overlap": _overlap(duplicates, contamination)
        | {"seconds": time.perf_counter() - between, "all_searched": all_searched, "all_searched_for": all_searched_for},
    }


def _duplicates(found: Duplicates, tokenizer: Tokenizer) -> Report:
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
            {"count": one.count, "tokens": len(one.tokens), "text": tokenizer.decode(one.tokens[:_MAX_DECODED].tolist())}
            for one in found.most_frequent
        ],
    }


def _overlap(duplicates: Duplicates, contamination: Contamination) -> Report:
    found, searched_for = contamination.found, contamination.searched_for
    return {
        "validation_documents_compared": sum(duplicates.validation_documents),
        "documents": sum(duplicates.validation_in_train),
        "span": SPAN,
        "validation_tokens_searched_for": sum(searched_for),
        "train_tokens_searched": contamination.searched,
        "tokens": sum(found),
        "share_of_tokens": sum(found) / max(sum(searched_for), 1),
        "by_source": [
            {"documents": documents, "tokens": tokens, "share_of_tokens": tokens / max(total, 1)}
            for documents, tokens, total in zip(duplicates.validation_in_train, found, searched_for, strict=True)
        ],
    }
