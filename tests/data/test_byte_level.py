"""tiktoken encodes only if it is proven equal, and for every byte-level tokenizer that splits text by a regular expression."""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from tokenizer_files import END, TEXTS, TRICKY, edited, open_with_tiktoken, train_file

from manta.data.tokenizer import byte_level
from manta.data.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return train_file(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def fast(file) -> Tokenizer:
    return open_with_tiktoken(file)


def test_a_million_spaces_fall_back_to_the_reference(fast, file):
    """tiktoken's regular expression overflows its stack near a million spaces."""
    text = "x" + " " * 1_000_000 + "y"
    assert np.array_equal(fast.encode([text])[0], Tokenizer(file).encode([text])[0])


def test_both_encoders_agree_on_all_character_classes(fast, file):
    """Each library has its own Unicode tables of letters, digits and spaces; they agree on the basic multilingual plane."""
    texts = ["".join(f"a{chr(c)}1{chr(c)} {chr(c)} " for c in range(start, start + 256)) for start in range(0, 0xD800, 256)]
    fast_ids, ids = fast.encode(texts), Tokenizer(file).encode(texts)
    assert all(np.array_equal(a, b) for a, b in zip(fast_ids, ids, strict=True))


# The split patterns of Llama 3 and Qwen, and one more.
OTHER_SPLITS = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[a-z]+|\s?[A-Z]",  # leaves text between its matches
]


def split_by(pattern: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, letters]}


@pytest.mark.parametrize(("pattern", "ignore_merges"), list(zip(OTHER_SPLITS, [True, False, False], strict=True)))
def test_tiktoken_reproduces_the_split_patterns_of_other_models(file, tmp_path, pattern, ignore_merges):
    def edit(spec):
        spec["pre_tokenizer"] = split_by(pattern)
        spec["model"]["ignore_merges"] = ignore_merges

    fast, reference = (Tokenizer(edited(file, tmp_path, edit)) for _ in range(2))
    assert fast.choose_encoder(TEXTS[:5]).startswith("tiktoken: same ids as tokenizers on 5 documents")
    texts = ["".join(f"a{chr(c)}1{chr(c)} {chr(c)}\n" for c in range(start, start + 256)) for start in range(0, 0x3100, 256)]
    texts += [*TRICKY, "12345 ABC'LL\r\n\r\n  x\n \n"]
    for text, ids in zip(texts, fast.encode(texts), strict=True):
        assert np.array_equal(ids, reference.encode([text])[0]), text[:40]
        assert reference.decode(ids) == text


def test_a_pattern_that_tiktoken_cannot_compile_is_reported(file, tmp_path):
    tokenizer = Tokenizer(edited(file, tmp_path, lambda spec: spec.update(pre_tokenizer=split_by(r"\X"))))
    assert tokenizer.choose_encoder(TEXTS[:3]).startswith("tokenizers: tiktoken cannot compile its pattern (")
    assert tokenizer.encoder == "tokenizers"
    assert tokenizer.decode(tokenizer.encode([TEXTS[0]])[0]) == TEXTS[0]


def test_nfc_text_is_not_normalized_again(file, tmp_path):
    path = edited(file, tmp_path, lambda spec: spec.update(normalizer={"type": "NFC"}))
    fast, reference = Tokenizer(path), Tokenizer(path)
    texts = [*TEXTS[:3], "na\u00efve", "nai\u0308ve", "\u1100\u1161 \u212b"]
    assert fast.choose_encoder(texts).startswith("tiktoken: same ids as tokenizers on 6 documents")
    assert all(np.array_equal(a, b) for a, b in zip(fast.encode(texts), reference.encode(texts), strict=True))
    assert np.array_equal(*fast.encode(["nai\u0308ve", "na\u00efve"]))


def test_both_encoders_recognize_added_tokens_in_text(file, tmp_path):
    def edit(spec):
        names = ("<tool>", "</tool>", "    ")
        token = spec["added_tokens"][0]
        spec["added_tokens"] += [{**token, "id": 600 + i, "content": name, "special": False} for i, name in enumerate(names)]

    path = edited(file, tmp_path, edit)
    fast, reference = Tokenizer(path), Tokenizer(path)
    assert fast.choose_encoder(TEXTS[:5]).startswith("tiktoken: same ids as tokenizers on 5 documents")
    texts = [*TEXTS, f"a<tool>b</tool>c<<tool>>{END}d</tool", "     x      ", "<tool>"]
    fast_ids, ids = fast.encode(texts), reference.encode(texts)
    assert all(np.array_equal(a, b) for a, b in zip(fast_ids, ids, strict=True))
    assert {600, 601} <= set(fast_ids[-3].tolist())
    assert 602 in fast_ids[-2]
    assert not any(reference.end_of_text in document for document in ids)


def with_merges(pairs: str, *, ignore_merges: bool):
    """Return an edit that leaves only these merges, written as "a b, b c"."""

    def edit(spec):
        merges = [pair.split(" ") for pair in pairs.split(", ")]
        letters = [letter for letter in spec["model"]["vocab"] if len(letter) == 1]
        tokens = dict.fromkeys([END, *letters, *("".join(pair) for pair in merges)])
        vocabulary = {token: number for number, token in enumerate(tokens)}
        spec["model"] |= {"vocab": vocabulary, "merges": merges, "ignore_merges": ignore_merges}

    return edit


@pytest.mark.parametrize(
    ("pairs", "ignore_merges", "equal"),
    [
        ("a b, b c, ab c", False, True),
        ("a b, b c, ab c", True, True),
        ("a b, b c, a bc", False, False),  # abc becomes ab, c: no merge joins these, but tiktoken would
        ("a b, b c, a bc", True, False),
        ("a b, b c, ab c, a bc", False, True),
        ("b c, a b, c d, ab cd", False, False),  # abcd becomes a, bc, d
        ("b c, a b, c d, ab cd", True, True),  # except as a whole word
    ],
)
def test_tiktoken_is_used_only_if_merges_are_equivalent(file, tmp_path, pairs, ignore_merges, equal):
    tokenizer = Tokenizer(edited(file, tmp_path, with_merges(pairs, ignore_merges=ignore_merges)))
    texts = ["".join(letters) for size in range(1, 7) for letters in product("abcd", repeat=size)]
    ids = tokenizer.encode(texts)
    choice = tokenizer.choose_encoder(["xyz"])
    assert choice.startswith("tiktoken: " if equal else "tokenizers: its merges do not produce its token 'abc")
    assert not equal or all(np.array_equal(a, b) for a, b in zip(tokenizer.encode(texts), ids, strict=True))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "it normalizes text"),
        (lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True), "its pre-tokenizer is not a single pattern"),
        (lambda spec: spec.update(pre_tokenizer=None), "its pre-tokenizer is not a single pattern"),
        (lambda spec: spec["model"].update(dropout=0.5), "its BPE has options that tiktoken lacks"),
        (lambda spec: spec["added_tokens"][0].update(special=False, lstrip=True), "its added tokens depend on their context"),
        (
            lambda spec: spec["added_tokens"].extend(
                {**spec["added_tokens"][0], "id": 600 + n, "content": "<ab>"[:n], "special": False} for n in (3, 4)
            ),
            "one of its added tokens is the start of another",
        ),
        (lambda spec: spec["model"]["merges"].reverse(), "its ids do not follow its merges"),
        (lambda spec: spec["model"]["merges"].pop(), "its ids do not follow its merges"),
        (lambda spec: spec["model"]["vocab"].pop("ÿ"), "its vocabulary is not byte-level"),
        (lambda spec: spec.update(model={"type": "WordLevel", "vocab": {END: 0, "a": 1}, "unk_token": "a"}), "its model is WordLevel"),
    ],
)
def test_a_tokenizer_with_an_obstacle_uses_the_reference(file, tmp_path, edit, reason):
    tokenizer = Tokenizer(edited(file, tmp_path, edit))
    choice = tokenizer.choose_encoder(TEXTS[:3])
    assert tokenizer.encoder == "tokenizers"
    assert choice.startswith("tokenizers: ")
    assert reason in choice


def test_an_encoder_that_differs_on_the_sample_is_not_used(file, monkeypatch):
    monkeypatch.setattr(byte_level, "_GPT2", r"\s+|\S+")
    tokenizer = Tokenizer(file)
    assert re.match(r"tokenizers: tiktoken gave other ids on \d+ of 30 documents, \d+ bytes", tokenizer.choose_encoder(TEXTS))
    assert tokenizer.encoder == "tokenizers"
    assert tokenizer.decode(tokenizer.encode([TEXTS[0]])[0]) == TEXTS[0]
