"""Token files of Megatron, nanoGPT and llm.c are used in place; every token is in train or in validation, once."""

import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from token_file_writers import write_llmc, write_megatron, write_nanogpt, write_tokenizer

from manta.data.config import CacheConfig, DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.prepare.prepare import find_prepared, prepare
from manta.data.sampling.samples import Samples
from manta.data.shards import manifest
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.manifest import PreparedData

END, T = 0, 16
SPLIT = {"train", "validation"}


def documents(count: int = 200, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randint(1, 256) for _ in range(rng.randint(1, 60))] for _ in range(count)]


def write(format_: str, path: Path, made: list[list[int]]) -> None:
    match format_:
        case "nanogpt":
            write_nanogpt(path, made, END)
        case "llm.c gpt-2" | "llm.c llama-3":
            write_llmc(path, made, END, model=format_.removeprefix("llm.c "))
        case _:
            write_megatron(path.with_suffix(""), [[*document, END] for document in made], np.uint16, sequences=2)


FORMATS = ["nanogpt", "llm.c gpt-2", "llm.c llama-3", "megatron"]


@pytest.fixture
def tokens(tmp_path) -> TokenizerConfig:
    write_tokenizer(tmp_path / "tokenizer.json")
    return TokenizerConfig(file=tmp_path / "tokenizer.json")


def config(tmp_path: Path, path: Path, **source) -> DataConfig:
    section = {"path": str(path)} | source
    return DataConfig(sources=(section,), sequence_length=T, directory=str(tmp_path / "corpora"), workers=1, validation=0.1)


def documents_by_side(prepared: PreparedData) -> dict[str, list[list[int]]]:
    """Return the documents of train and of validation, as attention and packing see them."""
    home = CorpusDirectory(prepared.corpora[0], CacheConfig())
    made = manifest.load_manifest(home)
    found: dict[str, list[list[int]]] = {}
    for side in sorted(SPLIT):
        shards = getattr(made, side).shards
        found[side] = [
            part.tolist() for shard in shards for part in np.split(home.tokens(shard), np.cumsum(home.read_index(shard).lengths)[:-1])
        ]
    return found


@pytest.mark.parametrize("format_", FORMATS)
def test_a_token_file_is_used_in_place(tmp_path, tokens, format_):
    path = tmp_path / "x.bin"
    write(format_, path, made := documents())
    data = config(tmp_path, path, **({"format": "nanogpt"} if format_ == "nanogpt" else {}))
    prepared = prepare(data, tokens)
    assert not list(Path(prepared.corpora[0]).glob("*.bin"))
    found = documents_by_side(prepared)
    if format_.startswith("llm.c"):  # its end of text precedes each document, and belongs to the one before
        expected = [[END], *([*document, END] for document in made[:-1]), made[-1]]
    else:
        expected = [[*document, END] for document in made]
    assert found["train"] + found["validation"] == expected
    held = sum(map(len, found["validation"])) / sum(map(len, expected))
    assert 0.08 < held < 0.12
    assert find_prepared(data, tokens) == prepared
    samples = Samples(prepared, data, tokens, seed=1)
    stream = [token for document in found["train"] for token in document]
    windows = [stream[at : at + T + 1] for at in range(0, len(stream) - T, T)]
    read = samples.train(np.arange(len(windows)))
    assert sorted(np.concatenate([read.tokens, read.targets[:, -1:]], axis=1).tolist()) == sorted(windows)


def test_a_validation_file_is_held_out(tmp_path, tokens):
    for name, seed in (("train.bin", 1), ("val.bin", 2)):
        write_nanogpt(tmp_path / name, documents(seed=seed), END)
    found = documents_by_side(
        prepare(config(tmp_path, tmp_path / "train.bin", format="nanogpt", validation=str(tmp_path / "val.bin")), tokens)
    )
    assert found == {side: [[*document, END] for document in documents(seed=seed)] for side, seed in (("train", 1), ("validation", 2))}


def test_a_file_that_is_one_document_is_cut_in_two(tmp_path, tokens):
    ids = np.random.default_rng(0).integers(1, 256, 5000).astype(np.uint16)
    ids.tofile(tmp_path / "train.bin")
    found = documents_by_side(prepare(config(tmp_path, tmp_path / "train.bin", format="nanogpt"), tokens))
    assert [len(side) for side in found.values()] == [1, 1]
    assert found["train"][0] + found["validation"][0] == ids.tolist()
    assert len(found["validation"][0]) == 500


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_of_token_ids_are_used_unchanged(tmp_path, tokens, kind):
    made = documents()
    table = {"input_ids": [[*document, END] if number % 2 else document for number, document in enumerate(made)]}
    if kind == "parquet":
        pq.write_table(pa.table(table), tmp_path / "ids.parquet", row_group_size=37)
        path = tmp_path / "ids.parquet"
    else:
        Dataset.from_dict(table).save_to_disk(tmp_path / "ids")
        path = tmp_path / "ids"
    found = documents_by_side(prepare(config(tmp_path, path, text_field="input_ids"), tokens))
    assert sorted(found["train"] + found["validation"]) == sorted([*document, END] for document in made)


def error_of(tmp_path: Path, tokens: TokenizerConfig, path: Path, **source) -> str:
    with pytest.raises(InputError) as caught:
        prepare(config(tmp_path, path, **source), tokens)
    assert not list(tmp_path.glob("corpora/*/manifest.json"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_bad_token_file_is_refused_in_one_line(tmp_path, tokens):
    bare, headed, indexed = (tmp_path / folder / "x.bin" for folder in "abc")
    for path, format_ in ((bare, "nanogpt"), (headed, "llm.c gpt-2"), (indexed, "megatron")):
        path.parent.mkdir()
        write(format_, path, documents())
    assert error_of(tmp_path, tokens, bare).startswith(
        f"{bare}: expected an .idx beside it or a header of llm.c, got neither. Set format: nanogpt"
    )
    assert "expected an llm.c data file" in error_of(tmp_path, tokens, bare, format="llm.c")
    for path, words in (
        (bare, "expected 0 bytes and then uint16 ids, got "),
        (headed, "expected 1024 bytes and then uint16 ids, got "),
        (indexed, "bytes of its .idx, got "),
    ):
        os.truncate(path, path.stat().st_size - 1)
        assert words in error_of(tmp_path, tokens, path, **({"format": "nanogpt"} if path == bare else {}))
    os.truncate(headed, headed.stat().st_size - 1)
    assert "tokens of its header, got " in error_of(tmp_path, tokens, headed)
    indexed.with_suffix(".idx").write_bytes(b"hello")
    assert error_of(tmp_path, tokens, indexed).startswith(f"{indexed.with_suffix('.idx')}: expected a Megatron index")


def test_the_index_is_part_of_a_corpus_and_half_a_pair_is_refused(tmp_path, tokens):
    path = tmp_path / "x.bin"
    write("megatron", path, documents())
    one = prepare(config(tmp_path, path), tokens)
    write_megatron(tmp_path / "x", [[*document, END] for document in documents()], np.uint16, sequences=1)
    spec = path.with_suffix(".idx").read_bytes()
    os.utime(path.with_suffix(".idx"), ns=(1, 1))
    other = prepare(config(tmp_path, path), tokens)
    assert other.corpora != one.corpora
    path.with_suffix(".idx").write_bytes(spec[:-8] + (10**6).to_bytes(8, "little"))
    assert "expected ascending document boundaries" in error_of(tmp_path / "bad", tokens, path)
    path.with_suffix(".idx").write_bytes(spec)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "y.idx").write_bytes(spec)
    assert "y.bin: expected a .bin beside its .idx, got no such file" in error_of(tmp_path / "bad", tokens, tmp_path / "half")


def test_token_ids_of_another_tokenizer_are_refused(tmp_path, tokens):
    ids = np.array([5] * 3000 + [257] + [6] * 50, dtype=np.uint16)
    ids.tofile(tmp_path / "x.bin")
    message = error_of(tmp_path, tokens, tmp_path / "x.bin", format="nanogpt")
    assert message.startswith(f"{tmp_path}/x.bin: token 3000: expected ids below the tokenizer's 257, got 257. Set tokenizer.file")
    pq.write_table(pa.table({"input_ids": [[1, 2], [3, 999]]}), tmp_path / "x.parquet")
    assert "x.parquet: row 2: expected token ids below the tokenizer's 257, got 999" in error_of(
        tmp_path, tokens, tmp_path / "x.parquet", text_field="input_ids"
    )
    message = error_of(tmp_path, TokenizerConfig(), tmp_path / "x.bin", format="nanogpt")
    assert "expected text, or the tokenizer that wrote its token ids, got token ids. Set tokenizer.file." in message
