"""`manta data verify`: read every byte of a prepared corpus and report all damage."""

import time
from typing import Any

from rich.filesize import decimal

from manta.data.errors import InputError
from manta.data.objectives.objective import window_shape
from manta.data.prepare.progress import progress
from manta.data.prepare.verify import corpus_size, verify
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.manifest import Manifest, joint_fingerprint, load_manifest
from manta.data.tokenizer import tokenizer
from manta.launch.inspect.charts import console
from manta.launch.inspect.resolve import DataTarget
from manta.launch.terminal import count_text


def check(target: DataTarget) -> dict[str, Any]:
    """Return what was verified, and in `damaged` a line for each error."""
    tokenizer_file, directories, fingerprint = target.paths()
    corpora: list[tuple[CorpusDirectory, Manifest]] = []
    damaged: list[str] = []
    for directory in directories:
        try:
            corpora.append((directory, load_manifest(directory)))
        except InputError as error:
            damaged.append(str(error))
    try:
        found = tokenizer.fingerprint(tokenizer.read_tokenizer(tokenizer_file))
        for other in {corpus.tokenizer for _, corpus in corpora} - {found}:
            expected = f"expected xxh3 {other}, as the corpus was written with, got {found}"
            damaged.append(f"{tokenizer_file}: {expected}. Restore that file.")
    except InputError as error:
        damaged.append(str(error))
    if fingerprint is not None and len(corpora) == len(directories):
        found = joint_fingerprint(tuple(corpus for _, corpus in corpora))
        if found != fingerprint:
            names = ", ".join(directory.root for directory in directories)
            damaged.append(f"{names}: fingerprint: expected {fingerprint}, as the run started with, got {found}. Restore that corpus.")
    shape = window_shape(target.config.data)
    files, total = corpus_size(corpora, shape)
    start = time.perf_counter()
    with progress("verify", total) as advance:
        for damage in verify(corpora, shape, advance=advance):
            is_ours = any(damage.path.startswith(f"{directory.root}/") for directory in directories)
            again, restore = f"Prepare it again: manta prepare {target.typed}", "Restore it: it is a source file, which is read in place."
            damaged.append(f"{damage.path}: expected {damage.expected}, got {damage.got}. {again if is_ours else restore}")
    splits = [split for _, corpus in corpora for split in (corpus.train, corpus.validation)]
    return {
        "corpora": [directory.root for directory in directories],
        "files": files,
        "bytes": total,
        "tokens": sum(split.tokens for split in splits),
        "documents": sum(split.documents for split in splits),
        "vocabulary": max((corpus.vocabulary for _, corpus in corpora), default=None),
        "seconds": time.perf_counter() - start,
        "damaged": damaged,
    }


def show(report: dict[str, Any]) -> None:
    """Print the report of an undamaged corpus."""
    rate = int(report["bytes"] / max(report["seconds"], 1e-9))
    size, ids = f"{decimal(report['bytes'])}, {decimal(rate)}/s", f"each id below {report['vocabulary']:,}"
    counts = f"{report['documents']:,} documents, {report['tokens']:,} tokens"
    console().print("\n".join([*report["corpora"], f"verified: {count_text(report['files'], 'file')}, {size}; {counts}, {ids}"]))
