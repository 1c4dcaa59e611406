"""Each document of a sample is named by its file and line, and that line holds its text."""

import gzip
import json
import random
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from sample_cases import T
from small_corpora import SMALL, documents

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.objectives.examples import IGNORED
from manta.data.prepare import prepare
from manta.data.sampling.origins import DocumentOrigin
from manta.data.sampling.packed_windows import PackedDataset
from manta.data.sampling.samples import Samples
from manta.data.shards.origins import ShardOrigins
from manta.data.sources import splits
from manta.data.tokenizer.tokenizer import Tokenizer

SETTINGS = {"sequence_length": 4 * T, "validation": 0.1, "workers": 1, "bad_rows": "skip"}
WAYS = {
    "one": {},
    "blocks": {"shuffle_shards": 2},
    "packed": {"packing": "best_fit"},
    "packed in blocks": {"packing": "best_fit", "shuffle_shards": 2},
    "mixed": {"mixture": [{"weights": {"web": 0.7, "notes": 0.3}}, {"from_tokens": 4000, "weights": {"notes": 0.9, "web": 0.1}}]},
    "mixed and packed in blocks": {"mixture": {"web": 0.5, "notes": 0.5}, "packing": "best_fit", "shuffle_shards": 3},
    "skipping": {"skip": [(10, 20), (100, 900)], "mixture": {"web": 0.7, "notes": 0.3}},
    "masked": {"objective": "masked", "pairs": "none"},
    "masked, packed": {"objective": "masked", "pairs": "none", "packing": "best_fit", "separate_documents": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write two sources of several formats: with bad rows, empty lines, copies, short documents, and files of several splits."""
    root = tmp_path_factory.mktemp("sources")
    web, notes = root / "web", root / "notes"
    web.mkdir()
    notes.mkdir()
    texts, rng = documents(120, seed=1), random.Random(1)
    lines = [json.dumps({"text": text}) for text in texts]
    for junk in ('{"text": 3}', "", '{"text": "short"}', lines[5], "not json", lines[60]):
        lines.insert(rng.randrange(len(lines)), junk)
    (web / "a.jsonl").write_text("\n".join(lines) + "\n")
    (web / "b.jsonl.gz").write_bytes(gzip.compress(("\n\n" + "\n".join(json.dumps({"text": text}) for text in documents(40, 2))).encode()))
    rows = [*documents(50, 3), None, "", texts[7], *documents(30, 4)]
    parquet.write_table(pa.table({"text": rows}), web / "c.parquet", row_group_size=9)
    for number, text in enumerate(documents(30, 5)):
        (notes / f"{number:02d}.txt").write_text(text.replace(" ", "\n", 3))
    paragraphs = ["ß " + text + ("\r\n\r\n" if number % 3 else "\n\n") for number, text in enumerate(documents(400, 6))]
    (notes / "long.txt").write_bytes("".join(paragraphs).encode())
    return root


@pytest.fixture(autouse=True)
def small_splits(monkeypatch):
    monkeypatch.setattr(splits, "SPLIT_BYTES", 8000)
    monkeypatch.setattr(splits, "TEXT_SPLIT_BYTES", 4000)


def config_of(folder: Path, **more) -> DataConfig:
    selection = {"filter": {"minimum_characters": 20, "dedup": True}}
    sources = {name: {"path": str(folder / name), **selection} for name in ("web", "notes")}
    return DataConfig(sources=sources, directory=str(folder / "corpora"), **SETTINGS | more)


def open_samples(data: DataConfig, tokens: TokenizerConfig = SMALL) -> tuple[Samples, Tokenizer]:
    prepared = prepare.prepare(data, tokens)
    return Samples(prepared, data, tokens, seed=7), Tokenizer(prepared.tokenizer)


def text_at(location: str) -> str:
    """Read a document where it is said to be: for a text file, all that starts there and could be of it."""
    path, kind, number = re.fullmatch(r"(.*): (line|row) (\d+)", location).groups()
    index = int(number) - 1
    if kind == "row":
        return parquet.read_table(path)["text"][index].as_py()
    content = (gzip.decompress(Path(path).read_bytes()) if path.endswith(".gz") else Path(path).read_bytes()).decode()
    lines = content.split("\n")
    return "\n".join(lines[index:])[:17_000] if path.endswith(".txt") else json.loads(lines[index])["text"]


def window_ids(samples: Samples, read_index: int) -> list[int]:
    """Return the tokens of a sample as it is trained on, without what the objective adds."""
    found = samples.train(np.array([read_index]))
    tokens, targets = found.tokens[0], found.targets[0]
    if samples._objective._special is not None:
        return np.where(targets == IGNORED, tokens, targets)[1:-1].tolist()
    return [*tokens.tolist(), int(targets[-1])]


def wrong_documents(samples: Samples, tokenizer: Tokenizer, read_indices: range) -> tuple[list[DocumentOrigin], list[DocumentOrigin]]:
    """Return all documents of samples, and those whose text is not where they are said to be."""
    found, wrong = [], []
    is_packed = isinstance(samples.sampler.sources[0].dataset, PackedDataset)
    for read_index in read_indices:
        (number,) = samples.sampler.sample_numbers(np.array([read_index])).tolist()
        ids, at = window_ids(samples, read_index), 0
        for document in samples.documents(number):
            own = ids[at : at + document.tokens]
            is_end = own[-1] == tokenizer.end_of_text
            text = tokenizer.decode(own[:-1] if is_end else own).strip("�")
            there = text_at(document.location)
            is_whole = at and is_end and ids[at - 1] == tokenizer.end_of_text and not is_packed and ".txt: " not in document.location
            if text not in there or (is_whole and text != there) or f"/{document.source}/" not in document.location:
                wrong.append(document)
            found.append(document)
            at += document.tokens
        assert at <= len(ids) if is_packed else at == len(ids)
    return found, wrong


@pytest.mark.parametrize("way", WAYS)
def test_each_document_of_a_sample_is_where_it_is_said_to_be(folder, way):
    samples, tokenizer = open_samples(config_of(folder, **WAYS[way]))
    total = samples.train_windows
    found, wrong = wrong_documents(samples, tokenizer, range(0, 2 * total, 7))
    assert not wrong, wrong[:3]
    assert len(found) > 100
    suffixes = {re.search(r"(\.\w+(?:\.gz)?|long\.txt): ", document.location)[1] for document in found}
    assert suffixes == {".jsonl", ".jsonl.gz", ".parquet", ".txt", "long.txt"} or way == "skipping"


@pytest.mark.parametrize("way", ["one", "packed"])
def test_a_mapping_that_is_off_by_one_is_noticed(folder, way, monkeypatch):
    real = ShardOrigins.positions
    monkeypatch.setattr(
        ShardOrigins, "positions", lambda self, home, shard, numbers: real(self, home, shard, (numbers + 1) % shard.documents)
    )
    samples, tokenizer = open_samples(config_of(folder, **WAYS[way]))
    found, wrong = wrong_documents(samples, tokenizer, range(0, samples.train_windows, 7))
    assert len(wrong) > len(found) / 2
