"""The tokenizer is lossless, keeps the names of special tokens as text, and rejects bad files."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import END, TEXTS, edited, error_of, open_with_tiktoken, train_file

from manta.data.tokenizer.tokenizer import Tokenizer, fingerprint, read_vocabulary
from manta.data.tokenizer.train import train


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return train_file(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def fast(file) -> Tokenizer:
    return open_with_tiktoken(file)


@pytest.fixture(scope="module")
def reference(file) -> Tokenizer:
    return Tokenizer(file)


def test_training_twice_gives_the_same_file(file):
    assert train(TEXTS, vocabulary=600, end_of_text=END) == file.read_text(encoding="utf-8")
    assert Tokenizer(file).vocabulary == 600
    assert Tokenizer(file).fingerprint == fingerprint(file.read_text(encoding="utf-8"))


@settings(deadline=None)
@given(text=st.text())
def test_decoding_restores_any_text(fast, reference, text):
    (ids,) = reference.encode([text])
    assert reference.decode(ids) == text
    assert np.array_equal(fast.encode([text])[0], ids)


def test_the_name_of_a_special_token_in_a_document_stays_text(fast, file):
    for tokenizer in (fast, Tokenizer(file)):
        (ids,) = tokenizer.encode([f"a{END}b"])
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == f"a{END}b"
        assert tokenizer.decode([tokenizer.end_of_text]) == END


def test_optional_fields_may_be_missing(file, tmp_path):
    def edit(spec):
        for key in ("truncation", "padding", "normalizer", "post_processor", "version"):
            del spec[key]
        for key in ("type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
            del spec["model"][key]

    tokenizer = Tokenizer(edited(file, tmp_path, edit))
    assert tokenizer.choose_encoder(TEXTS[:3]).startswith("tiktoken: ")
    path = edited(file, tmp_path, lambda spec: spec.pop("added_tokens"))  # the end of text is then a token like any other
    assert Tokenizer(path).choose_encoder(TEXTS[:3]).startswith("tokenizers: its ids do not follow its merges")


def test_truncation_and_padding_of_a_file_are_ignored(file, tmp_path):
    def edit(spec):
        spec["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
        spec["padding"] = {
            "strategy": {"Fixed": 128},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": END,
        }

    tokenizer, plain = Tokenizer(edited(file, tmp_path, edit)), Tokenizer(file)
    texts = ["x", TEXTS[0]]
    assert all(np.array_equal(a, b) for a, b in zip(tokenizer.encode(texts), plain.encode(texts), strict=True))


@pytest.fixture(scope="module", params=["bpe", "wordpiece", "unigram"])
def any_file(request, tmp_path_factory) -> Path:
    """One file per algorithm, without the special tokens of masking or fill-in-the-middle."""
    return train_file(tmp_path_factory.mktemp(request.param) / "tokenizer.json", TEXTS[:4], 300, algorithm=request.param)


def test_a_panic_of_the_library_is_one_line(file, tmp_path):
    hostile = edited(file, tmp_path, lambda spec: spec.update(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "xx"}))
    assert "got a document it cannot encode (index out of bounds" in error_of(lambda: Tokenizer(hostile).encode(["hello world"]))


def test_a_malformed_file_is_refused(any_file, tmp_path):
    whole = json.loads(any_file.read_text())
    malformed = tmp_path / "malformed.json"
    invalid = "expected a tokenizer.json as tokenizers.Tokenizer saves it, got an invalid one"
    no_vocabulary = {**whole, "model": {key: value for key, value in whole["model"].items() if key != "vocab"}}
    for spec in ([], [whole], 3, None, "x", {}, {**whole, "model": None}, {**whole, "model": {}}, no_vocabulary, {"model": whole}):
        malformed.write_text(json.dumps(spec))
        assert error_of(lambda: Tokenizer(malformed)).startswith(f"{malformed}: {invalid} (")
    malformed.write_text(any_file.read_text()[:500])
    assert error_of(lambda: Tokenizer(malformed)).startswith(f"{malformed}: {invalid} (")
    panics = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}  # the library's, and no Exception
    for more in (panics, {"x": "nines"}, {"x": float("inf")}):
        malformed.write_text(json.dumps(whole | more).replace('"nines"', "9" * 5000))
        assert error_of(lambda: Tokenizer(malformed)).startswith(f"{malformed}: {invalid} (")
        assert error_of(lambda: read_vocabulary(malformed)).startswith(f"{malformed}: {invalid} (")
    malformed.write_text('{"model": ' + "[" * 10_000)
    assert error_of(lambda: Tokenizer(malformed)).startswith(f"{malformed}: {invalid} (")
    assert len(error_of(lambda: Tokenizer(any_file, end_of_text="x" * 10_000))) < 1000
    malformed.unlink()
    os.mkfifo(malformed)
    assert "got an error: not a regular file" in error_of(lambda: Tokenizer(malformed))
    malformed.unlink()
    malformed.touch()
    os.truncate(malformed, 2**28)
    assert "got an error: larger than 134,217,728 bytes" in error_of(lambda: Tokenizer(malformed))
    malformed.write_bytes(b"\xff\xfe")
    assert "expected a readable tokenizer.json, got an error: 'utf-8' codec can't decode" in error_of(lambda: Tokenizer(malformed))
    assert "expected a readable tokenizer.json, got an error: No such file" in error_of(lambda: Tokenizer(tmp_path / "none.json"))
    assert "expected a readable tokenizer.json, got an error: not a regular file" in error_of(lambda: Tokenizer(tmp_path))


def test_a_file_without_the_end_of_text_is_refused(any_file):
    message = error_of(lambda: Tokenizer(any_file, end_of_text="<eos>"))
    expected = r".*: expected a token '<eos>', got only the special tokens <\|endoftext\|>(, \[UNK\])?\. Set tokenizer\.end_of_text\."
    assert re.fullmatch(expected, message)


def test_an_id_of_two_tokens_is_refused(any_file, tmp_path):
    def twice_added(spec):
        spec["added_tokens"].append({**spec["added_tokens"][0], "content": "<other>", "id": 70})

    def twice(spec):
        if isinstance(spec["model"]["vocab"], dict):
            spec["model"]["vocab"]["a"] = 70

    path = edited(any_file, tmp_path, twice_added)
    assert re.match(rf"{path}: expected one token per id, got .* and '<other>' for 70\. ", error_of(lambda: Tokenizer(path)))
    path = edited(any_file, tmp_path, twice)
    if "unigram" not in str(any_file):  # its ids are the indexes of its pieces
        assert "for 70. Set tokenizer.file" in error_of(lambda: Tokenizer(path))


def test_an_id_beyond_any_vocabulary_is_refused(any_file, tmp_path):
    def edit(spec):
        if isinstance(spec["model"]["vocab"], dict):
            spec["model"]["vocab"]["zzz"] = 4_000_000_000
        spec["added_tokens"].append({**spec["added_tokens"][0], "content": "zzz", "id": 4_000_000_000})

    path = edited(any_file, tmp_path, edit)
    assert (
        error_of(lambda: Tokenizer(path))
        == f"{path}: expected ids below 16777216, got 4000000000 for 'zzz'. Set tokenizer.file to another."
    )


def test_text_without_a_token_is_an_error(any_file, tmp_path):
    def edit(spec):
        vocabulary = {END: 0, "a": 1}
        spec["model"]["vocab"] = vocabulary if isinstance(spec["model"]["vocab"], dict) else [[END, 0.0], ["a", -1.0]]
        spec["model"]["merges"] = []
        spec["added_tokens"] = spec["added_tokens"][:1]

    tokenizer = Tokenizer(edited(any_file, tmp_path, edit))
    if "bpe" not in str(any_file):
        assert re.search(
            r"edited.json: expected a token for any text, got a document it cannot encode \(.*\)\. ",
            error_of(lambda: tokenizer.encode(["b"])),
        )
