"""The tokenizer: lossless, deaf to special text, and tiktoken only where it is proven equal."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import END, TEXTS, altered, opened_fast, told, trained

from manta.data.tokenizer import tokenizer
from manta.data.tokenizer.tokenizer import Tokenizer
from manta.data.tokenizer.train import train as train_tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def fast(file) -> Tokenizer:
    return opened_fast(file)


@pytest.fixture(scope="module")
def reference(file) -> Tokenizer:
    return Tokenizer(file)


def test_training_twice_gives_the_same_file(file):
    assert train_tokenizer(TEXTS, vocabulary=600, end_of_text=END) == file.read_text(encoding="utf-8")
    assert Tokenizer(file).vocabulary == 600
    assert Tokenizer(file).fingerprint == tokenizer.fingerprint(file.read_text(encoding="utf-8"))


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back(fast, reference, text):
    (ids,) = reference.encode([text])
    assert reference.decode(ids) == text
    assert np.array_equal(fast.encode([text])[0], ids)


def test_special_text_in_a_document_stays_text(fast, file):
    for opened in (fast, Tokenizer(file)):
        (ids,) = opened.encode([f"a{END}b"])
        assert opened.end_of_text not in ids
        assert opened.decode(ids) == f"a{END}b"
        assert opened.decode([opened.end_of_text]) == END


def test_a_file_may_leave_out_what_it_does_not_need(file, tmp_path):
    def alter(spec):
        for key in ("truncation", "padding", "normalizer", "post_processor", "version"):
            del spec[key]
        for key in ("type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
            del spec["model"][key]

    opened = Tokenizer(altered(file, tmp_path, alter))
    assert opened.choose_encoder(TEXTS[:3]).startswith("tiktoken: ")
    path = altered(file, tmp_path, lambda spec: spec.pop("added_tokens"))  # its end of text is a token like any other
    assert Tokenizer(path).choose_encoder(TEXTS[:3]).startswith("tokenizers: its ids do not follow its merges")


def test_a_file_that_would_cut_and_fill_up_texts_does_neither_to_a_document(file, tmp_path):
    def alter(spec):
        spec["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
        spec["padding"] = {
            "strategy": {"Fixed": 128},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": END,
        }

    opened, plain = Tokenizer(altered(file, tmp_path, alter)), Tokenizer(file)
    texts = ["x", TEXTS[0]]
    assert all(np.array_equal(a, b) for a, b in zip(opened.encode(texts), plain.encode(texts), strict=True))


@pytest.fixture(scope="module", params=["bpe", "wordpiece", "unigram"])
def any_file(request, tmp_path_factory) -> Path:
    """One of each algorithm, without what a masked objective or fill-in-the-middle needs."""
    return trained(tmp_path_factory.mktemp(request.param), TEXTS[:4], 300, algorithm=request.param)


def test_a_malformed_file_is_told(any_file, tmp_path):
    whole = json.loads(any_file.read_text())
    malformed = tmp_path / "malformed.json"
    no_vocabulary = {**whole, "model": {key: value for key, value in whole["model"].items() if key != "vocab"}}
    for spec in ([], [whole], 3, None, "x", {}, {**whole, "model": None}, {**whole, "model": {}}, no_vocabulary, {"model": whole}):
        malformed.write_text(json.dumps(spec))
        assert told(lambda: Tokenizer(malformed)).startswith(f"{malformed}: not a tokenizer.json (")
    malformed.write_text(any_file.read_text()[:500])
    assert told(lambda: Tokenizer(malformed)).startswith(f"{malformed}: not a tokenizer.json (")
    malformed.write_bytes(b"\xff\xfe")
    assert "cannot be read (UnicodeDecodeError)" in told(lambda: Tokenizer(malformed))
    assert "cannot be read (FileNotFoundError)" in told(lambda: Tokenizer(tmp_path / "none.json"))
    assert "cannot be read (IsADirectoryError)" in told(lambda: Tokenizer(tmp_path))


def test_a_file_without_the_end_of_text_is_told(any_file):
    said = told(lambda: Tokenizer(any_file, end_of_text="<eos>"))
    assert re.fullmatch(r".*: no token '<eos>'; its special tokens: <\|endoftext\|>(, \[UNK\])?; set tokenizer.end_of_text", said)


def test_an_id_that_stands_for_two_tokens_is_told(any_file, tmp_path):
    def twice_added(spec):
        spec["added_tokens"].append({**spec["added_tokens"][0], "content": "<other>", "id": 70})

    def twice(spec):
        if isinstance(spec["model"]["vocab"], dict):
            spec["model"]["vocab"]["a"] = 70

    path = altered(any_file, tmp_path, twice_added)
    assert re.match(rf"{path}: id 70 stands for .* and for '<other>'; wants one token an id", told(lambda: Tokenizer(path)))
    path = altered(any_file, tmp_path, twice)
    if "unigram" not in str(any_file):  # its ids are the places of its pieces
        assert "id 70 stands for " in told(lambda: Tokenizer(path))


def test_an_id_beyond_any_vocabulary_is_told(any_file, tmp_path):
    def alter(spec):
        if isinstance(spec["model"]["vocab"], dict):
            spec["model"]["vocab"]["zzz"] = 4_000_000_000
        spec["added_tokens"].append({**spec["added_tokens"][0], "content": "zzz", "id": 4_000_000_000})

    path = altered(any_file, tmp_path, alter)
    assert told(lambda: Tokenizer(path)) == f"{path}: id 4000000000 stands for 'zzz'; wants ids below 16777216"


def test_a_tokenizer_that_has_no_token_for_a_text_is_told(any_file, tmp_path):
    def alter(spec):
        vocabulary = {END: 0, "a": 1}
        spec["model"]["vocab"] = vocabulary if isinstance(spec["model"]["vocab"], dict) else [[END, 0.0], ["a", -1.0]]
        spec["model"]["merges"] = []
        spec["added_tokens"] = spec["added_tokens"][:1]

    opened = Tokenizer(altered(any_file, tmp_path, alter))
    if "bpe" not in str(any_file):
        assert re.search(r"altered.json: cannot encode a document \(.*\); wants a token for any text", told(lambda: opened.encode(["b"])))
