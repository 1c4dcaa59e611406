"""`manta data verify`: every byte of a prepared corpus read, and all that is damaged told."""

import time
from pathlib import Path
from typing import Any

from manta.data.errors import InputError
from manta.data.objectives.objective import window_shape
from manta.data.prepare.progress import progress
from manta.data.shards import manifest
from manta.data.shards.corpus_directory import Home
from manta.data.shards.manifest import Manifest
from manta.data.shards.verify import Damage, size, verify
from manta.data.tokenizer import tokenizer
from manta.launch.inspect.charts import console
from manta.launch.inspect.resolve import Opened

Told = dict[str, Any]


def check(opened: Opened) -> Told:
    """What was verified, and under `damaged` a line for each thing that is wrong."""
    file, homes, fingerprint = opened.places()
    corpora: list[tuple[Home, Manifest]] = []
    damaged: list[str] = []
    for home in homes:
        try:
            corpora.append((home, manifest.load(home)))
        except InputError as error:
            damaged.append(str(error))
    damaged += _tokenizer(file, corpora)
    if fingerprint is not None and len(corpora) == len(homes):
        got = manifest.joint_fingerprint(tuple(corpus for _, corpus in corpora))
        if got != fingerprint:
            wants = f"{fingerprint}, what the run was begun with"
            damaged.append(f"{', '.join(home.root for home in homes)}: fingerprint: got {got}, wants {wants}; bring that corpus back")
    shape = window_shape(opened.config.data)
    files, total = size(corpora, shape)
    begun = time.perf_counter()
    with progress("verify", total) as advance:
        damaged += [_line(damage, opened.typed, homes) for damage in verify(corpora, shape, tell=advance)]
    seconds = time.perf_counter() - begun
    return {
        "corpora": [home.root for home in homes],
        "files": files,
        "bytes": total,
        "tokens": sum(corpus.train.tokens + corpus.validation.tokens for _, corpus in corpora),
        "documents": sum(corpus.train.documents + corpus.validation.documents for _, corpus in corpora),
        "vocabulary": max((corpus.vocabulary for _, corpus in corpora), default=None),
        "seconds": seconds,
        "damaged": damaged,
    }


def _tokenizer(file: Path, corpora: list[tuple[Home, Manifest]]) -> list[str]:
    try:
        got = tokenizer.fingerprint(tokenizer.read_tokenizer(file))
    except InputError as error:
        return [str(error)]
    others = {corpus.tokenizer for _, corpus in corpora} - {got}
    return [f"{file}: got xxh3 {got}, wants {other}: it is not what the corpus was written with; bring that back" for other in others]


def _line(damage: Damage, typed: str, homes: list[Home]) -> str:
    ours = any(damage.path.startswith(f"{home.root}/") for home in homes)
    remedy = f"make it again: manta prepare {typed}" if ours else "it is read where it lies: bring back what it was"
    return f"{damage.path}: got {damage.got}, wants {damage.wanted}; {remedy}"


def show(told: Told) -> None:
    """Where nothing is damaged."""
    rate = told["bytes"] / max(told["seconds"], 1e-9) / 1e9
    out = console()
    for corpus in told["corpora"]:
        out.print(corpus, soft_wrap=True)
    out.print(
        f"verified: {told['files']:,} files, {told['bytes'] / 1e6:,.1f} MB, {rate:.1f} GB/s; {told['documents']:,} documents,"
        f" {told['tokens']:,} tokens, each id below {told['vocabulary']:,}",
        soft_wrap=True,
    )
