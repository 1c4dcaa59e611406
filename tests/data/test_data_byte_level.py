"""tiktoken is a second encoder only where it is proven equal, and is one for all tokenizers that split bytes by a regular expression."""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from tokenizer_files import END, TEXTS, TRICKY, altered, opened_fast, trained

from manta.data.tokenizer import byte_level
from manta.data.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def fast(file) -> Tokenizer:
    return opened_fast(file)


def test_a_sea_of_blanks_does_not_drown_the_fast_encoder(fast, file):
    """tiktoken's regular expression overflows its stack near a million blanks; such a document goes to the reference."""
    text = "x" + " " * 1_000_000 + "y"
    assert np.array_equal(fast.encode([text])[0], Tokenizer(file).encode([text])[0])


def test_both_encoders_know_the_same_characters(fast, file):
    """Letters, digits and blanks are told apart by each library's own Unicode tables; these agree on the whole first plane."""
    texts = ["".join(f"a{chr(c)}1{chr(c)} {chr(c)} " for c in range(start, start + 256)) for start in range(0, 0xD800, 256)]
    fast_ids, ids = fast.encode(texts), Tokenizer(file).encode(texts)
    assert all(np.array_equal(a, b) for a, b in zip(fast_ids, ids, strict=True))


# As Llama 3 and Qwen split text, each with its own regular expression.
OTHER_SPLITS = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[a-z]+|\s?[A-Z]",  # leaves much between its matches
]


def split_by(pattern: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, letters]}


@pytest.mark.parametrize(("pattern", "ignore_merges"), list(zip(OTHER_SPLITS, [True, False, False], strict=True)))
def test_tiktoken_splits_text_as_others_do(file, tmp_path, pattern, ignore_merges):
    def alter(spec):
        spec["pre_tokenizer"] = split_by(pattern)
        spec["model"]["ignore_merges"] = ignore_merges

    fast, reference = (Tokenizer(altered(file, tmp_path, alter)) for _ in range(2))
    assert fast.choose_encoder(TEXTS[:5]).startswith("tiktoken: same ids as tokenizers on 5 documents")
    texts = ["".join(f"a{chr(c)}1{chr(c)} {chr(c)}\n" for c in range(start, start + 256)) for start in range(0, 0x3100, 256)]
    texts += [*TRICKY, "12345 ABC'LL\r\n\r\n  x\n \n"]
    for text, ids in zip(texts, fast.encode(texts), strict=True):
        assert np.array_equal(ids, reference.encode([text])[0]), text[:40]
        assert reference.decode(ids) == text


def test_a_pattern_that_tiktoken_can_not_compile_is_told(file, tmp_path):
    opened = Tokenizer(altered(file, tmp_path, lambda spec: spec.update(pre_tokenizer=split_by(r"\X"))))
    assert opened.choose_encoder(TEXTS[:3]).startswith("tokenizers: tiktoken can not compile its pattern (")
    assert opened.encoder == "tokenizers"
    assert opened.decode(opened.encode([TEXTS[0]])[0]) == TEXTS[0]


def test_a_text_of_composed_letters_needs_no_normalizing(file, tmp_path):
    path = altered(file, tmp_path, lambda spec: spec.update(normalizer={"type": "NFC"}))
    fast, reference = Tokenizer(path), Tokenizer(path)
    texts = [*TEXTS[:3], "na\u00efve", "nai\u0308ve", "\u1100\u1161 \u212b"]
    assert fast.choose_encoder(texts).startswith("tiktoken: same ids as tokenizers on 6 documents")
    assert all(np.array_equal(a, b) for a, b in zip(fast.encode(texts), reference.encode(texts), strict=True))
    assert np.array_equal(*fast.encode(["nai\u0308ve", "na\u00efve"]))


def test_tokens_that_a_text_may_spell_are_recognised_by_both_encoders(file, tmp_path):
    def alter(spec):
        names = ("<tool>", "</tool>", "    ")
        token = spec["added_tokens"][0]
        spec["added_tokens"] += [{**token, "id": 600 + i, "content": name, "special": False} for i, name in enumerate(names)]

    path = altered(file, tmp_path, alter)
    fast, reference = Tokenizer(path), Tokenizer(path)
    assert fast.choose_encoder(TEXTS[:5]).startswith("tiktoken: same ids as tokenizers on 5 documents")
    texts = [*TEXTS, f"a<tool>b</tool>c<<tool>>{END}d</tool", "     x      ", "<tool>"]
    fast_ids, ids = fast.encode(texts), reference.encode(texts)
    assert all(np.array_equal(a, b) for a, b in zip(fast_ids, ids, strict=True))
    assert {600, 601} <= set(fast_ids[-3].tolist())
    assert 602 in fast_ids[-2]
    assert not any(reference.end_of_text in each for each in ids)


def with_merges(pairs: str, *, ignore_merges: bool):
    """A change to a spec: these merges alone, as "a b, b c"."""

    def alter(spec):
        merges = [pair.split(" ") for pair in pairs.split(", ")]
        letters = [letter for letter in spec["model"]["vocab"] if len(letter) == 1]
        tokens = dict.fromkeys([END, *letters, *("".join(pair) for pair in merges)])
        vocabulary = {token: number for number, token in enumerate(tokens)}
        spec["model"] |= {"vocab": vocabulary, "merges": merges, "ignore_merges": ignore_merges}

    return alter


@pytest.mark.parametrize(
    ("pairs", "ignore_merges", "equal"),
    [
        ("a b, b c, ab c", False, True),
        ("a b, b c, ab c", True, True),
        ("a b, b c, a bc", False, False),  # abc is cut into ab and c, and no merge joins these: tiktoken would
        ("a b, b c, a bc", True, False),
        ("a b, b c, ab c, a bc", False, True),
        ("b c, a b, c d, ab cd", False, False),  # abcd becomes a, bc, d
        ("b c, a b, c d, ab cd", True, True),  # but where it stands alone
    ],
)
def test_merges_are_alike_where_no_two_tokens_of_a_text_could_make_a_third(file, tmp_path, pairs, ignore_merges, equal):
    opened = Tokenizer(altered(file, tmp_path, with_merges(pairs, ignore_merges=ignore_merges)))
    texts = ["".join(letters) for size in range(1, 7) for letters in product("abcd", repeat=size)]
    ids = opened.encode(texts)
    choice = opened.choose_encoder(["xyz"])
    assert choice.startswith("tiktoken: " if equal else "tokenizers: its merges do not make its own token 'abc")
    assert not equal or all(np.array_equal(a, b) for a, b in zip(opened.encode(texts), ids, strict=True))


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "it normalizes text"),
        (lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True), "it splits text in a way of its own"),
        (lambda spec: spec.update(pre_tokenizer=None), "it splits text in a way of its own"),
        (lambda spec: spec["model"].update(dropout=0.5), "its BPE has options of its own"),
        (lambda spec: spec["added_tokens"][0].update(special=False, lstrip=True), "its added tokens reach beyond their own letters"),
        (
            lambda spec: spec["added_tokens"].extend(
                {**spec["added_tokens"][0], "id": 600 + n, "content": "<ab>"[:n], "special": False} for n in (3, 4)
            ),
            "its added tokens begin alike",
        ),
        (lambda spec: spec["model"]["merges"].reverse(), "its ids do not follow its merges"),
        (lambda spec: spec["model"]["merges"].pop(), "its ids do not follow its merges"),
        (lambda spec: spec["model"]["vocab"].pop("ÿ"), "its vocabulary is not of bytes"),
        (lambda spec: spec.update(model={"type": "WordLevel", "vocab": {END: 0, "a": 1}, "unk_token": "a"}), "its model is WordLevel"),
    ],
)
def test_a_tokenizer_tiktoken_can_not_copy_is_left_to_the_reference(file, tmp_path, alter, reason):
    opened = Tokenizer(altered(file, tmp_path, alter))
    choice = opened.choose_encoder(TEXTS[:3])
    assert opened.encoder == "tokenizers"
    assert choice.startswith("tokenizers: ")
    assert reason in choice


def test_an_encoder_that_differs_on_the_sample_is_not_used(file, monkeypatch):
    monkeypatch.setattr(byte_level, "_GPT2", r"\s+|\S+")
    opened = Tokenizer(file)
    assert re.match(r"tokenizers: tiktoken gave other ids on \d+ of 30 documents, \d+ bytes", opened.choose_encoder(TEXTS))
    assert opened.encoder == "tokenizers"
    assert opened.decode(opened.encode([TEXTS[0]])[0]) == TEXTS[0]
