"""Token shards of others are read where they lie: nothing is copied, and every token is in train or held out, once."""

import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from foreign_corpora import write_llmc, write_megatron, write_nanogpt, write_tokenizer

from manta.data.config import CacheConfig, DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.prepare.prepare import find, prepare
from manta.data.sampling.samples import Samples
from manta.data.shards import manifest
from manta.data.shards.corpus_directory import Home
from manta.data.shards.manifest import Prepared

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
    given = {"path": str(path)} | source
    return DataConfig(sources=(given,), sequence_length=T, directory=str(tmp_path / "corpora"), workers=1, validation=0.1)


def splits(prepared: Prepared) -> dict[str, list[list[int]]]:
    """Documents of each side, as attention and packing see them."""
    home = Home(prepared.corpora[0], CacheConfig())
    made = manifest.load(home)
    found: dict[str, list[list[int]]] = {}
    for side in sorted(SPLIT):
        shards = getattr(made, side).shards
        found[side] = [
            part.tolist() for shard in shards for part in np.split(home.tokens(shard), np.cumsum(home.index(shard).lengths)[:-1])
        ]
    return found


@pytest.mark.parametrize("format_", FORMATS)
def test_a_file_of_anothers_is_read_where_it_lies(tmp_path, tokens, format_):
    path = tmp_path / "their.bin"
    write(format_, path, made := documents())
    named = {"format": "nanogpt"} if format_ == "nanogpt" else {}
    data = config(tmp_path, path, **named)
    prepared = prepare(data, tokens)
    assert not list(Path(prepared.corpora[0]).glob("*.bin"))
    found = splits(prepared)
    if format_.startswith("llm.c"):  # its end of text stands before each document, and belongs to the one before
        expected = [[END], *([*document, END] for document in made[:-1]), made[-1]]
    else:
        expected = [[*document, END] for document in made]
    assert found["train"] + found["validation"] == expected
    held = sum(map(len, found["validation"])) / sum(map(len, expected))
    assert 0.08 < held < 0.12
    assert find(data, tokens) == prepared
    samples = Samples(prepared, data, tokens, seed=1)
    stream = [token for document in found["train"] for token in document]
    windows = [stream[at : at + T + 1] for at in range(0, len(stream) - T, T)]
    read = samples.train(np.arange(len(windows)))
    assert sorted(np.concatenate([read.tokens, read.targets[:, -1:]], axis=1).tolist()) == sorted(windows)


def test_a_file_of_its_own_may_be_held_out(tmp_path, tokens):
    for name, seed in (("train.bin", 1), ("val.bin", 2)):
        write_nanogpt(tmp_path / name, documents(seed=seed), END)
    found = splits(prepare(config(tmp_path, tmp_path / "train.bin", format="nanogpt", validation=str(tmp_path / "val.bin")), tokens))
    assert found == {side: [[*document, END] for document in documents(seed=seed)] for side, seed in (("train", 1), ("validation", 2))}


def test_a_file_that_is_one_document_is_cut_in_two(tmp_path, tokens):
    ids = np.random.default_rng(0).integers(1, 256, 5000).astype(np.uint16)
    ids.tofile(tmp_path / "train.bin")
    found = splits(prepare(config(tmp_path, tmp_path / "train.bin", format="nanogpt"), tokens))
    assert [len(side) for side in found.values()] == [1, 1]
    assert found["train"][0] + found["validation"][0] == ids.tolist()
    assert len(found["validation"][0]) == 500


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_of_ids_are_taken_over_as_they_are(tmp_path, tokens, kind):
    made = documents()
    table = {"input_ids": [[*document, END] if number % 2 else document for number, document in enumerate(made)]}
    if kind == "parquet":
        pq.write_table(pa.table(table), tmp_path / "ids.parquet", row_group_size=37)
        path = tmp_path / "ids.parquet"
    else:
        Dataset.from_dict(table).save_to_disk(tmp_path / "ids")
        path = tmp_path / "ids"
    found = splits(prepare(config(tmp_path, path, text_field="input_ids"), tokens))
    assert sorted(found["train"] + found["validation"]) == sorted([*document, END] for document in made)


def refused(tmp_path: Path, tokens: TokenizerConfig, path: Path, **source) -> str:
    with pytest.raises(InputError) as caught:
        prepare(config(tmp_path, path, **source), tokens)
    assert not list(tmp_path.glob("corpora/*/manifest.json"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_files_are_told_in_a_line(tmp_path, tokens):
    bare, headed, indexed = (tmp_path / folder / "x.bin" for folder in "abc")
    for path, format_ in ((bare, "nanogpt"), (headed, "llm.c gpt-2"), (indexed, "megatron")):
        path.parent.mkdir()
        write(format_, path, documents())
    assert refused(tmp_path, tokens, bare).startswith(f"{bare}: no .idx beside it and no header of llm.c; bare ids want format: nanogpt")
    assert "no header of llm.c's data files" in refused(tmp_path, tokens, bare, format="llm.c")
    for path, words in (
        (bare, "wants 0 and whole uint16 ids: it is truncated"),
        (headed, "wants 1024 and whole uint16 ids: it is truncated"),
        (indexed, "that its .idx tells: it is truncated"),
    ):
        os.truncate(path, path.stat().st_size - 1)
        assert words in refused(tmp_path, tokens, path, **({"format": "nanogpt"} if path == bare else {}))
    os.truncate(headed, headed.stat().st_size - 1)
    assert "that its header tells: it is truncated or damaged" in refused(tmp_path, tokens, headed)
    indexed.with_suffix(".idx").write_bytes(b"hello")
    assert refused(tmp_path, tokens, indexed).startswith(f"{indexed.with_suffix('.idx')}: not a Megatron index")


def test_an_index_decides_what_a_corpus_is_and_half_a_pair_is_told(tmp_path, tokens):
    path = tmp_path / "x.bin"
    write("megatron", path, documents())
    one = prepare(config(tmp_path, path), tokens)
    write_megatron(tmp_path / "x", [[*document, END] for document in documents()], np.uint16, sequences=1)
    spec = path.with_suffix(".idx").read_bytes()
    os.utime(path.with_suffix(".idx"), ns=(1, 1))
    other = prepare(config(tmp_path, path), tokens)
    assert other.corpora != one.corpora
    path.with_suffix(".idx").write_bytes(spec[:-8] + (10**6).to_bytes(8, "little"))
    assert "bounds of documents make no sense" in refused(tmp_path / "bad", tokens, path)
    path.with_suffix(".idx").write_bytes(spec)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "y.idx").write_bytes(spec)
    assert "y.bin: missing, and its .idx is there" in refused(tmp_path / "bad", tokens, tmp_path / "half")


def test_ids_of_another_tokenizer_are_told(tmp_path, tokens):
    ids = np.array([5] * 3000 + [257] + [6] * 50, dtype=np.uint16)
    ids.tofile(tmp_path / "x.bin")
    told = refused(tmp_path, tokens, tmp_path / "x.bin", format="nanogpt")
    assert told.startswith(
        f"{tmp_path}/x.bin: token 3000: got id 257, wants ids below the tokenizer's 257: it was written with another one"
    )
    pq.write_table(pa.table({"input_ids": [[1, 2], [3, 999]]}), tmp_path / "x.parquet")
    assert "x.parquet: row 2: got token id 999" in refused(tmp_path, tokens, tmp_path / "x.parquet", text_field="input_ids")
    told = refused(tmp_path, TokenizerConfig(), tmp_path / "x.bin", format="nanogpt")
    assert "holds token ids; wants the tokenizer that wrote them: set tokenizer.file" in told
