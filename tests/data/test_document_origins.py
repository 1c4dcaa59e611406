"""Each document of a sample is named by its file and line, and that line holds its text."""

import gzip
import json
import logging
import random
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from sample_cases import T
from small_corpora import SMALL, documents, write_lines
from token_file_writers import write_megatron, write_nanogpt, write_tokenizer

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.objectives.examples import IGNORED
from manta.data.prepare import prepare
from manta.data.sampling.origins import DocumentOrigin
from manta.data.sampling.packed_windows import PackedDataset
from manta.data.sampling.samples import Samples
from manta.data.shards.origins import ShardOrigins
from manta.data.sources import splits
from manta.data.storage import positions
from manta.data.storage.positions import Places
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
    """Read a document at its location. Of a text file return all that starts there and could be the document."""
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
    """Return all documents of samples, and those with other text at their location."""
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
def test_the_named_line_holds_the_text_of_each_document_of_a_sample(folder, way):
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


@pytest.mark.parametrize("format_", ["megatron", "nanogpt"])
@pytest.mark.parametrize("way", ["one", "packed"])
def test_documents_of_token_files_are_named_by_their_number(tmp_path, format_, way):
    """Megatron's index also counts empty documents, which no shard holds."""
    write_tokenizer(tmp_path / "tokenizer.json")
    rng = random.Random(3)
    made = [[rng.randint(1, 256) for _ in range(rng.randint(1, 200))] for _ in range(300)]
    path = tmp_path / "x.bin"
    if format_ == "megatron":
        made = [[*document, 0] if number % 5 else [] for number, document in enumerate(made)]
        write_megatron(tmp_path / "x", made, np.uint16, sequences=3)
    else:
        write_nanogpt(path, made, 0)
        made = [[*document, 0] for document in made]
    source = {"path": str(path), "format": format_}
    data = DataConfig(sources={"web": source}, directory=str(tmp_path / "corpora"), **SETTINGS | {"bad_rows": "fail"} | WAYS[way])
    samples, _ = open_samples(data, TokenizerConfig(file=tmp_path / "tokenizer.json"))
    numbers: set[int] = set()
    for sample in range(samples.train_windows):
        ids, at = window_ids(samples, sample), 0
        for document in samples.documents(sample):
            own, number = ids[at : at + document.tokens], int(document.location.removeprefix(f"{path}: document "))
            there = made[number - 1]
            assert any(there[start : start + len(own)] == own for start in range(len(there)))
            numbers.add(number)
            at += document.tokens
    nonempty = [number for number, document in enumerate(made, 1) if document]
    assert sorted(numbers) == nonempty[: len(numbers)]
    assert len(nonempty) * 0.8 < len(numbers) < len(nonempty)  # the last ones are held out
    records = [json.loads(path.read_text())["origins"] for path in tmp_path.glob("corpora/web-*/piece-*.json")]
    assert [record["train"]["file"] is None for record in records] == [format_ == "nanogpt"]  # consecutive numbers take no file


def test_both_parts_of_a_document_that_is_cut_for_validation_have_its_number(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    np.random.default_rng(0).integers(1, 256, 5000).astype(np.uint16).tofile(tmp_path / "x.bin")
    data = DataConfig(
        sources={"web": {"path": str(tmp_path / "x.bin"), "format": "nanogpt"}}, directory=str(tmp_path / "corpora"), **SETTINGS
    )
    samples, _ = open_samples(data, TokenizerConfig(file=tmp_path / "tokenizer.json"))
    assert samples.documents(3) == [DocumentOrigin(source="web", location=f"{tmp_path}/x.bin: document 1", tokens=4 * T + 1)]
    (record,) = [json.loads(path.read_text())["origins"] for path in tmp_path.glob("corpora/web-*/piece-*.json")]
    assert record["train"] == record["validation"] == {"file": None, "xxh3": "", "first": 0}


def test_next_sentence_pairs_name_the_documents_of_part_a(folder):
    samples, tokenizer = open_samples(config_of(folder, objective="masked"))
    for sample in range(0, samples.train_windows, 5):
        found = samples.train(np.array([sample]))
        ids = np.where(found.targets == IGNORED, found.tokens, found.targets)[0]
        part_a = tokenizer.decode(ids[1 : np.argmax(found.segments[0]) - 1])  # without [CLS] and [SEP]
        named = samples.documents(sample)
        assert sum(document.tokens for document in named) == 4 * T - 3
        first = part_a.partition("<|endoftext|>")[0].strip("�")
        assert first in text_at(named[0].location)


@pytest.fixture
def small_corpus(tmp_path) -> DataConfig:
    """A config of a prepared corpus, made by the test alone."""
    write_lines(tmp_path / "x.jsonl", documents(60))
    data = DataConfig(sources={"web": str(tmp_path / "x.jsonl")}, directory=str(tmp_path / "corpora"), **SETTINGS)
    prepare.prepare(data, SMALL)
    return data


def all_documents(data: DataConfig) -> list[DocumentOrigin]:
    samples, _ = open_samples(data)
    return [document for sample in range(samples.train_windows) for document in samples.documents(sample)]


def test_origins_of_a_corpus_from_before_they_were_recorded_are_unknown(small_corpus, tmp_path, caplog):
    whole = all_documents(small_corpus)
    assert all(document.location for document in whole)
    for path in tmp_path.glob("corpora/web-*/*.origins"):
        path.unlink()
    for path in tmp_path.glob("corpora/*/piece-*.json"):
        record = json.loads(path.read_text())
        del record["origins"]
        path.write_text(json.dumps(record))
    with caplog.at_level(logging.WARNING):
        found = all_documents(small_corpus)
    assert [(document.source, document.tokens) for document in found] == [(document.source, document.tokens) for document in whole]
    assert {document.location for document in found} == {None}
    assert not caplog.records


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing", "a directory", "record missing", "record damaged", "another record"])
def test_damaged_origins_are_unknown_with_one_warning(tmp_path, small_corpus, damage, caplog):
    (corpus,) = tmp_path.glob("corpora/web-*")
    origins, record = corpus / "piece-00000.train.origins", corpus / "piece-00000.json"
    content = origins.read_bytes()
    match damage:
        case "changed":
            origins.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        case "truncated":
            origins.write_bytes(content[:-8])
        case "missing":
            origins.unlink()
        case "a directory":
            origins.unlink()
            origins.mkdir()
        case "record missing":
            record.unlink()
        case "record damaged":
            record.write_bytes(record.read_bytes()[:-20])
        case "another record":
            (changed := json.loads(record.read_text()))["train"]["documents"] += 1
            record.write_text(json.dumps(changed))
    with caplog.at_level(logging.WARNING):
        found = all_documents(small_corpus)
    known = [document for document in found if document.location]
    assert 0 < len(known) < len(found)  # the other shards' documents are named
    assert len(caplog.records) == 1
    assert "\n" not in caplog.text.strip()
    assert str(corpus) in caplog.text


def test_an_index_that_became_damaged_makes_origins_unknown(tmp_path, small_corpus, caplog):
    samples, _ = open_samples(small_corpus)
    for path in tmp_path.glob("corpora/*/*.train.idx"):
        path.write_bytes(bytes(path.stat().st_size))
    for sample in range(samples.train_windows):
        assert {document.location for document in samples.documents(sample)} == {None}
        assert sum(document.tokens for document in samples.documents(sample)) == 4 * T + 1
    assert len(caplog.records) == 1


@pytest.mark.parametrize("change", ["gone", "other size", "far"])
def test_a_line_that_cannot_be_counted_is_named_by_its_byte(tmp_path, small_corpus, change, monkeypatch):
    path = tmp_path / "x.jsonl"
    content = path.read_bytes()
    prepared = prepare.prepare(small_corpus, SMALL)
    samples, tokenizer = Samples(prepared, small_corpus, SMALL, seed=7), Tokenizer(prepared.tokenizer)
    match change:
        case "gone":
            path.unlink()
        case "other size":
            path.write_bytes(content + b"\n")
        case "far":
            monkeypatch.setattr(positions, "MAX_COUNTED", -1)
    for sample in range(samples.train_windows):
        ids, at = window_ids(samples, sample), 0
        for document in samples.documents(sample):
            byte = int(document.location.removeprefix(f"{path}: byte "))
            own = [token for token in ids[at : at + document.tokens] if token != tokenizer.end_of_text]
            assert tokenizer.decode(own) in json.loads(content[byte:].partition(b"\n")[0])["text"]
            at += document.tokens


def test_lines_are_counted_across_blocks_as_wc_counts_them(tmp_path, monkeypatch):
    monkeypatch.setattr(positions, "BLOCK", 7)
    rng = random.Random(4)
    content = bytes(rng.choices(b"ab\r\n", k=500))
    (tmp_path / "x.jsonl").write_bytes(content)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "x.txt").write_text("é" + content.decode(), newline="")
    at = sorted(rng.sample(range(501), 60))
    lines = [1 + content[:byte].count(b"\n") for byte in at]
    for name, unit, shift in (("x.jsonl", "byte", 0), ("x.jsonl.gz", "byte", 0), ("x.txt", "character", 1)):
        path = str(tmp_path / name)
        for places in (Places(unit=unit, paths=(path,)), Places(unit=unit, paths=(path,)).recorded()):
            assert places.locations([byte + shift for byte in at]) == [f"{path}: line {line}" for line in lines]
            assert [places.location(byte + shift) for byte in at] == [f"{path}: line {line}" for line in lines]
            assert places.location(10**6) == f"{path}: {unit} 1000000"


def test_a_file_name_that_is_not_unicode_is_recorded(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_lines(folder / "caf\udce9.jsonl", documents(60))
    data = DataConfig(sources={"web": str(folder)}, directory=str(tmp_path / "corpora"), **SETTINGS)
    locations = {document.location for document in all_documents(data)}
    assert len(locations) > 30
    assert all(location.startswith(f"{folder}/caf\\udce9.jsonl: byte ") for location in locations)


def test_a_resumed_preparation_writes_missing_origins_again(tmp_path, small_corpus):
    (corpus,) = tmp_path.glob("corpora/web-*")
    whole = {path.name: path.read_bytes() for path in corpus.iterdir()}
    (corpus / "manifest.json").unlink()
    (corpus / "piece-00000.train.origins").unlink()
    (corpus / "piece-00001.train.origins").write_bytes(b"x" * len(whole["piece-00001.train.origins"]))
    prepare.prepare(small_corpus, SMALL)
    assert {path.name: path.read_bytes() for path in corpus.iterdir()} == whole
