"""Ways to read a corpus: mixtures, packing, blocks and objectives, each as overrides of a config."""

from dataclasses import fields
from pathlib import Path

import numpy as np
from small_corpora import SMALL, documents, write_lines

from manta.data.config import CacheConfig, DataConfig, TokenizerConfig
from manta.data.objectives.examples import Examples
from manta.data.prepare import prepare
from manta.data.sampling.samples import Samples
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.shard import ShardWriter
from manta.data.shards.windows import TokenStream

T = 16

WAYS = {
    "one": {},
    "blocks": {"shuffle_shards": 2},
    "packed": {"packing": "best_fit"},
    "packed in blocks": {"packing": "best_fit", "shuffle_shards": 2, "separate_documents": True},
    "mixed": {"mixture": [{"weights": {"web": 0.7, "code": 0.3}}, {"from_tokens": 700 * T, "weights": {"code": 0.9, "web": 0.1}}]},
    "mixed and packed in blocks": {"mixture": {"web": 0.5, "code": 0.5}, "packing": "best_fit", "shuffle_shards": 3},
    "skipping": {"skip": [(10, 20), (500, 900)], "mixture": {"web": 0.7, "code": 0.3}},
    "fill in the middle": {"fill_in_the_middle": 0.7, "separate_documents": True},
    "masked": {"objective": "masked"},
    "masked words in blocks": {"objective": "masked", "whole_words": True, "shuffle_shards": 2, "separate_documents": True},
    "masked, packed": {"objective": "masked", "pairs": "none", "packing": "best_fit", "separate_documents": True},
    "sentence order, mixed": {"objective": "masked", "pairs": "sentence_order", "mixture": {"web": 0.2, "code": 0.8}},
}


def config_of(folder: Path, **more) -> DataConfig:
    sources = {"web": str(folder / "web"), "code": str(folder / "code.jsonl")}
    settings = {"sequence_length": T, "validation": 0.1, "workers": 1, "sources": sources, "directory": str(folder / "corpora")}
    return DataConfig(**settings | more)


def open_way(folder: Path, tokens: TokenizerConfig = SMALL, **more) -> Samples:
    data = config_of(folder, **more)
    return Samples(prepare.prepare(data, tokens), data, tokens, seed=7)


def write_sources(folder: Path, *, shards: int = 3, code_documents: int = 20) -> Path:
    """Write two sources: `web` in several files, `code` in one."""
    (folder / "web").mkdir()
    for part in range(shards):
        write_lines(folder / "web" / f"{part}.jsonl", documents(12, seed=part))
    write_lines(folder / "code.jsonl", documents(code_documents, seed=9))
    return folder


def write_stream(folder: Path, *shards: list[list[int]], dtype: type = np.uint16) -> TokenStream:
    """Write shards of documents, and return them as a stream."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index, shard in enumerate(shards):
        with ShardWriter(folder / f"{index}", np.dtype(dtype)) as writer:
            for document in shard:
                writer.extend(np.array(document), np.array([len(document)]), 0)
            written.append(writer.commit())
    return TokenStream(CorpusDirectory(str(folder), CacheConfig()), written)


def same_examples(a: Examples, b: Examples) -> bool:
    pairs = ((getattr(a, field.name), getattr(b, field.name)) for field in fields(Examples))
    return all((x is None and y is None) or np.array_equal(x, y) for x, y in pairs)
