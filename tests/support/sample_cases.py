"""Ways to read a corpus: mixtures, packing, blocks and objectives, each opened by a config."""

from pathlib import Path

from corpora import SMALL

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.prepare import prepare
from manta.data.sampling.samples import Samples

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
    settings = {"sequence_length": T, "validation": 0.1, "workers": 1, "sources": sources, "directory": folder / "corpora"}
    return DataConfig(**settings | more)


def open_way(folder: Path, tokens: TokenizerConfig = SMALL, **more) -> Samples:
    data = config_of(folder, **more)
    return Samples(prepare.prepare(data, tokens), data, tokens, seed=7)
