"""Preparing a corpus: complete, with the same bytes every time, and only what is missing."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from small_corpora import SMALL, config, content, documents, texts_of, write_lines, write_source

from manta.data.config import CacheConfig, DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.prepare import build, prepare
from manta.data.prepare.encode import encode_split
from manta.data.shards import manifest
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.manifest import PreparedData
from manta.data.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def undisturbed(lines, tmp_path_factory) -> PreparedData:
    return prepare.prepare(config(tmp_path_factory.mktemp("corpora"), lines), SMALL)


def test_every_document_is_in_train_or_in_validation_once(undisturbed):
    written = [text for part in range(12) for text in documents(100, seed=part)]
    train, validation = texts_of(undisturbed, "train"), texts_of(undisturbed, "validation")
    assert sorted(train + validation) == sorted(written)
    assert not set(train) & set(validation)
    assert 0.07 < len(validation) / len(written) < 0.13


def test_a_tokenizer_that_was_changed_into_another_valid_one_is_built_again(lines, tmp_path, capfd):
    data = config(tmp_path, lines)
    prepared = prepare.prepare(data, SMALL)
    written = prepared.tokenizer.read_bytes()
    prepared.tokenizer.write_bytes(written + b"\n")
    assert prepare.find_prepared(data, SMALL) is None
    assert prepare.prepare(data, SMALL) == prepared
    assert prepared.tokenizer.read_bytes() == written
    assert f"{prepared.tokenizer}: damaged; its content has changed since it was written." in capfd.readouterr().err


def test_a_corpus_from_before_the_hash_of_its_tokenizer_was_recorded_is_still_read(lines, tmp_path):
    data = config(tmp_path, lines)
    prepared = prepare.prepare(data, SMALL)
    prepared.tokenizer.with_suffix(".xxh3").unlink()
    assert prepare.find_prepared(data, SMALL) == prepared == prepare.prepare(data, SMALL)


def test_a_document_of_two_sources_is_on_one_side_only(tmp_path):
    texts = documents(300)
    (tmp_path / "b").mkdir()
    write_lines(tmp_path / "b" / "0.jsonl", texts[150:])
    write_lines(tmp_path / "b" / "1.jsonl", texts[:150][::-1])
    data = config(tmp_path / "corpora", write_lines(tmp_path / "a.jsonl", texts), tmp_path / "b")
    prepared = prepare.prepare(data, SMALL)
    assert len(prepared.corpora) == 2
    assert not set(texts_of(prepared, "train")) & set(texts_of(prepared, "validation"))


def test_a_text_of_few_words_fills_a_part_of_the_vocabulary(tmp_path, capsys):
    """A user who asked for 32,000 tokens would look for them in the model."""
    for vocabulary in (262, 5000):
        tokens = SMALL.model_copy(update={"vocabulary": vocabulary})
        prepared = prepare.prepare(
            config(tmp_path / "corpora", write_lines(tmp_path / "a.jsonl", [f"{n} words and more" for n in range(300)])), tokens
        )
        size = Tokenizer(prepared.tokenizer).vocabulary
        said = f"tokenizer: {size} tokens; the text has no more than these\n" in capsys.readouterr().err
        assert (size == vocabulary, said) in {(True, False), (False, True)}
    assert said


@pytest.mark.parametrize("workers", [2, 4])
def test_many_workers_write_the_same_bytes_as_one(lines, undisturbed, tmp_path, workers):
    prepared = prepare.prepare(config(tmp_path, lines, workers=workers), SMALL)
    assert content(prepared) == content(undisturbed)
    assert prepared.tokenizer.read_bytes() == undisturbed.tokenizer.read_bytes()
    assert prepared.fingerprint == undisturbed.fingerprint


def test_the_manifest_adds_up(undisturbed):
    home = CorpusDirectory(undisturbed.corpora[0], CacheConfig())
    corpus = manifest.load_manifest(home)
    assert corpus.encoder.startswith("tiktoken: same ids as tokenizers on")
    assert corpus.tokenizer == Tokenizer(undisturbed.tokenizer).fingerprint
    assert corpus.text_bytes == sum(len(text) for part in range(12) for text in documents(100, seed=part))
    tokens = np.concatenate([home.tokens(shard) for shard in corpus.validation.shards])
    assert corpus.validation.tokens == len(tokens)
    shares = np.bincount(tokens) / len(tokens)
    assert corpus.validation.unigram_entropy == pytest.approx(-sum(p * np.log(p) for p in shares if p))


def test_a_prepared_corpus_is_found_and_not_made_again(lines, undisturbed):
    directory = Path(undisturbed.corpora[0])
    data = config(directory.parent, lines)
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert prepare.find_prepared(data, SMALL) == undisturbed
    assert prepare.prepare(data, SMALL) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert PreparedData.model_validate_json(undisturbed.model_dump_json()) == undisturbed


def test_other_settings_or_files_are_another_corpus(lines, undisturbed, tmp_path):
    directory = Path(undisturbed.corpora[0]).parent
    assert prepare.find_prepared(config(directory, lines, validation=0.2), SMALL) is None
    assert prepare.find_prepared(config(directory, lines), SMALL.model_copy(update={"vocabulary": 401})) is None
    assert prepare.find_prepared(config(directory, write_lines(tmp_path / "other.jsonl", ["x"])), SMALL) is None


@pytest.mark.parametrize(
    ("keys", "tokenizer", "corpus"),
    [
        ({}, "tokenizer-066dfdfbc07e", "x-jsonl-2b7912a74023"),
        ({"dedup": True, "not_matching": "number 7"}, "tokenizer-5ebd7f3d395f", "x-jsonl-0981ab6cb003"),
    ],
)
def test_directory_names_are_those_of_earlier_versions(tmp_path, monkeypatch, keys, tokenizer, corpus):
    monkeypatch.chdir(tmp_path)
    write_lines(Path("x.jsonl"), [f"some words number {i}" for i in range(50)])
    os.utime("x.jsonl", ns=(0, 10**18))
    source = {"path": "x.jsonl", "filter": keys}
    data = DataConfig(sources=(source,), sequence_length=8, validation=0.2, workers=1)
    prepared = prepare.prepare(data, TokenizerConfig(vocabulary=300))
    assert prepared.tokenizer.parent.name == tokenizer
    assert Path(prepared.corpora[0]).name == corpus


def test_a_tokenizer_file_is_copied_unchanged(lines, undisturbed, tmp_path):
    tokens = TokenizerConfig(file=undisturbed.tokenizer)
    prepared = prepare.prepare(config(tmp_path, lines), tokens)
    assert prepared.tokenizer.read_bytes() == undisturbed.tokenizer.read_bytes()
    assert prepared.fingerprint == undisturbed.fingerprint
    assert prepare.find_prepared(config(tmp_path, lines), tokens) == prepared


def test_preparing_again_repairs_a_damaged_corpus(lines, undisturbed, tmp_path):
    data = config(tmp_path, lines)
    made = prepare.prepare(data, SMALL)
    directory, whole = Path(made.corpora[0]), content(made)
    for damage in (
        lambda: os.truncate(directory / "piece-00003.train.bin", 100),
        lambda: (directory / "piece-00004.train.idx").write_bytes(whole["piece-00004.train.idx"][:-1] + b"\1"),
        (directory / "piece-00005.validation.bin").unlink,
        lambda: (directory / "manifest.json").write_text("{}"),
        lambda: (directory / "manifest.json").write_bytes(whole["manifest.json"][:-9]),
    ):
        damage()
        assert prepare.prepare(data, SMALL) == made
        assert made.fingerprint == undisturbed.fingerprint
        assert content(made) == whole


def test_preparing_again_repairs_a_packing_or_tokenizer(lines, tmp_path):
    data = config(tmp_path, lines, packing="best_fit")
    made = prepare.prepare(data, SMALL)
    whole, packed = content(made), Path(made.corpora[0]) / "piece-00003.train.packing-1-17-16.bin"
    for damage in (
        packed.unlink,
        lambda: os.truncate(packed, 100),
        lambda: packed.write_bytes(b"\1" + whole[packed.name][1:]),
        lambda: (packed.parent / "manifest.json").write_bytes(b"\xff\xfe"),
    ):
        damage()
        assert prepare.prepare(data, SMALL) == made
        assert content(made) == whole
    written = made.tokenizer.read_bytes()
    made.tokenizer.write_bytes(written[:1000])
    assert prepare.prepare(data, SMALL) == made
    assert made.tokenizer.read_bytes() == written
    packed.unlink()
    assert prepare.find_prepared(data, SMALL) is None


def test_a_bad_source_is_refused_before_anything_is_written(tmp_path):
    good = write_lines(tmp_path / "good.jsonl", documents(20))
    with pytest.raises(InputError, match="no such files"):
        prepare.prepare(config(tmp_path / "corpora", good, tmp_path / "none.jsonl"), SMALL)
    with pytest.raises(InputError, match=r"none\.json: expected a readable tokenizer\.json"):
        prepare.prepare(config(tmp_path / "corpora", good), TokenizerConfig(file=tmp_path / "none.json"))
    assert not (tmp_path / "corpora").exists()


def test_a_source_without_documents_is_refused(tmp_path):
    blank = tmp_path / "blank.jsonl.gz"
    blank.write_bytes(gzip.compress(b"\n\n"))
    with pytest.raises(InputError, match="expected documents, got none"):
        prepare.prepare(config(tmp_path / "corpora", blank), SMALL)
    assert not list(tmp_path.glob("corpora/*/manifest.json"))


def test_an_unwritable_directory_is_refused(tmp_path):
    good = write_lines(tmp_path / "good.jsonl", documents(20))
    with pytest.raises(InputError, match=r"data\.directory: .*good\.jsonl"):
        prepare.prepare(config(good, good), SMALL)


def test_too_little_text_is_refused_with_the_remedy(tmp_path):
    good = write_lines(tmp_path / "good.jsonl", documents(20))
    with pytest.raises(InputError, match=r"data\.sequence_length: expected at least 100001 for a sample of 100000, got \d+ train tokens"):
        prepare.prepare(config(tmp_path / "corpora", good, sequence_length=100_000), SMALL)
    with pytest.raises(InputError, match=r"data\.validation: .* got 0 validation tokens\. Raise data\.validation from 0\.0001 to 0\.\d"):
        prepare.prepare(config(tmp_path / "corpora", good, sequence_length=300, validation=0.0001), SMALL)


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    good = write_lines(tmp_path / "good.jsonl", documents(20))
    monkeypatch.setattr(build, "encode_split", lambda *args: (write_lines(good, documents(21)), encode_split(*args))[1])
    before = good.stat()
    with pytest.raises(InputError, match="changed while it was read"):
        prepare.prepare(config(tmp_path / "corpora", good), SMALL)
    assert not list(tmp_path.glob("corpora/*/manifest.json"))
    monkeypatch.undo()
    write_lines(good, documents(20))  # the file is restored, as from a snapshot: no split of the changed file is reused
    os.utime(good, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = prepare.prepare(config(tmp_path / "corpora", good), SMALL)
    assert again.fingerprint == prepare.prepare(config(tmp_path / "clean", good), SMALL).fingerprint
