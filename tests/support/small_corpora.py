"""Helpers for tests of corpora: small documents, configs, and what a prepared corpus holds."""

import json
import random
from pathlib import Path

import numpy as np

from manta.data.config import CacheConfig, DataConfig, TokenizerConfig
from manta.data.shards import manifest
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.manifest import PreparedData
from manta.data.tokenizer.tokenizer import Tokenizer

SMALL = TokenizerConfig(vocabulary=400, train_bytes=100_000)


def config(directory: Path, *sources: object, **more) -> DataConfig:
    settings = {"sequence_length": 16, "validation": 0.1, "workers": 1} | more
    return DataConfig(sources=tuple(map(str, sources)), directory=str(directory), **settings)


def documents(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(500)]
    return [" ".join(rng.choices(words, k=rng.randint(5, 120))) for _ in range(count)]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_source(folder: Path) -> Path:
    """Write a source of twelve files, so that a preparation can stop between them."""
    for part in range(12):
        write_lines(folder / f"{part:02d}.jsonl", documents(100, seed=part))
    return folder


def content(prepared: PreparedData) -> dict[str, bytes]:
    """Return the bytes of every file of a prepared corpus."""
    return {path.name: path.read_bytes() for path in sorted(Path(prepared.corpora[0]).iterdir())}


def texts_of(prepared: PreparedData, split: str) -> list[str]:
    tokenizer = Tokenizer(prepared.tokenizer)
    texts = []
    for root in prepared.corpora:
        home = CorpusDirectory(root, CacheConfig())
        for shard in getattr(manifest.load_manifest(home), split).shards:
            for document in np.split(home.tokens(shard), np.cumsum(home.read_index(shard).lengths)[:-1]):
                assert document[-1] == tokenizer.end_of_text
                texts.append(tokenizer.decode(document[:-1]))
    return texts
