"""Training three kinds of tokenizers: deterministic, lossless, and without special tokens in text."""

import json
import math
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.data.errors import InputError
from manta.data.tokenizer import unigram
from manta.data.tokenizer.tokenizer import MASKING_TOKENS, Tokenizer
from manta.data.tokenizer.train import train

ALGORITHMS = ["bpe", "wordpiece", "unigram"]
TEXTS = [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:12]]
END = "<|endoftext|>"


def trained(directory: Path, algorithm: str, texts: list[str] = TEXTS, **options) -> Tokenizer:
    path = directory / f"{algorithm}.json"
    content = train(texts, algorithm=algorithm, **{"vocabulary": 600, "end_of_text": END, "special_tokens": MASKING_TOKENS, **options})
    path.write_text(content, encoding="utf-8")
    return Tokenizer(path, end_of_text=options.get("end_of_text", END))


def test_training_is_deterministic_on_any_number_of_cores():
    """Hash map order differs in each process. The rare letters are equally frequent, so which are kept depends on the order as well."""
    script = f"""
import sysconfig
from pathlib import Path
from manta.data.tokenizer.tokenizer import fingerprint
from manta.data.tokenizer.train import train
texts = [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:5]]
texts.append(" ".join(chr(letter) + chr(letter + 1) for letter in range(0x1200, 0x1400, 2)))
for algorithm in {ALGORITHMS}:
    print(fingerprint(train(texts, vocabulary=500, end_of_text="<end>", algorithm=algorithm, lowercase=algorithm == "wordpiece")))
"""
    fingerprints = [
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "RAYON_NUM_THREADS": cores}, capture_output=True, text=True, check=True
        ).stdout.split()
        for cores in ("1", "3")
    ]
    assert len(set(fingerprints[0])) == len(ALGORITHMS)
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_vocabulary_has_its_size_and_special_tokens_first(tmp_path, algorithm):
    tokenizer = trained(tmp_path, algorithm)
    special = tokenizer.special_tokens()
    assert tokenizer.vocabulary == 600
    assert (special.end_of_text, special.cls, special.sep, special.mask, special.pad) == (0, 1, 2, 3, 4)
    others = [5] if algorithm == "wordpiece" else []
    assert np.flatnonzero(~special.is_text).tolist() == [0, 1, 2, 3, 4, *others]
    assert len(tokenizer._reference.get_vocab()) == 600


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_small_corpus_fills_less_of_a_vocabulary(tmp_path, algorithm):
    for texts in ([], ["a"], ["one two three"] * 9):
        tokenizer = trained(tmp_path, algorithm, texts, vocabulary=1000)
        assert tokenizer.vocabulary < 300
        assert tokenizer.encode(texts) is not None


@pytest.fixture(scope="module")
def byte_unigram(tmp_path_factory) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("unigram"), "unigram")


@settings(deadline=None)
@given(text=st.text())
def test_unigram_decoding_restores_any_text(byte_unigram, text):
    (ids,) = byte_unigram.encode([text])
    assert byte_unigram.decode(ids) == text
    assert byte_unigram.special_tokens().is_text[ids].all()


def test_unigram_encodes_control_characters_and_emoji(byte_unigram):
    assert byte_unigram._spec["model"]["unk_id"] is None
    texts = [
        "".join(map(chr, range(0x250))),
        "🙂👩‍👩‍👧\U0010ffff",
        "\r\n\t \u2028",
        " ".join([END, *MASKING_TOKENS]),
        "x" * 10_000,
        " " * 10_000,
    ]
    for text, ids in zip(texts, byte_unigram.encode(texts), strict=True):
        assert byte_unigram.decode(ids) == text
        assert min(ids) > 4


def test_unigram_compresses_text_better_than_bpe(byte_unigram, tmp_path):
    """With a small vocabulary, the entropy code of a text is shorter with unigram pieces, which are chosen for it."""

    def bits(tokenizer: Tokenizer) -> float:
        counts = np.bincount(np.concatenate(tokenizer.encode(TEXTS)))
        counts = counts[counts > 0]
        return float(-(counts * np.log2(counts / counts.sum())).sum())

    size = sum(len(text.encode()) for text in TEXTS)
    assert sum(map(len, byte_unigram.encode(TEXTS))) < size / 2
    assert bits(byte_unigram) < 0.97 * bits(trained(tmp_path, "bpe"))


def test_wordpiece_normalizes_as_bert_does(tmp_path):
    texts = ["The unbelievable naïve Café, believable? Unbelievably believable! 雪山\n", "can't UNBELIEVABLE\u200b\x00 cafés "] * 5
    uncased = trained(tmp_path, "wordpiece", texts, vocabulary=90, lowercase=True)
    assert uncased.decode(uncased.encode(["The CAFÉ Ünbelievable"])[0]) == "the cafe unbelievable"
    vocabulary = uncased._reference.get_vocab()
    assert {"雪", "山", "un", "##a", "##b"} <= vocabulary.keys()
    assert not any(token != token.lower() for token in vocabulary if not token.startswith("["))
    assert not {"é", "##雪", "##山", "##,", "\x00"} & vocabulary.keys()
    (ids,) = uncased.encode(["believable zzz believable"])
    assert uncased.decode(ids) == "believable [UNK] believable"
    cased = trained(tmp_path, "wordpiece", texts, vocabulary=120)
    assert cased.decode(cased.encode(["The Café naïve"])[0]) == "The Café naïve"


def test_wordpiece_limits_rare_letters(tmp_path):
    texts = ["abra cadabra " * 20, " ".join(chr(0x1200 + i) * 2 for i in range(500))]
    tokenizer = trained(tmp_path, "wordpiece", texts, vocabulary=206)
    letters = {token for token in tokenizer._reference.get_vocab() if len(token) == 1}
    assert tokenizer.vocabulary == 206
    assert letters == {*"abcdr", *(chr(0x1200 + i) for i in range(95))}  # the first of the equally frequent ones


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_end_of_text_that_may_occur_in_text_is_refused(tmp_path, algorithm):
    for name in ("z", "eos", *(["[UNK]"] if algorithm == "wordpiece" else [])):
        with pytest.raises(InputError) as caught:
            trained(tmp_path, algorithm, ["eos z eos"] * 9, end_of_text=name)
        expected = f"expected a token that is not a word, got {name!r}. Use one such as <|{name}|>."
        assert str(caught.value) == f"tokenizer.end_of_text: {expected}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_words_of_up_to_4096_bytes_are_not_cut(algorithm, monkeypatch):
    """A corpus without longer words keeps the tokenizer that it had before words were cut."""
    texts = [*TEXTS, " ".join(letter * 4095 for letter in "abcde"), "-" * 4096, " " * 4096]

    def fingerprint() -> str:
        return train(texts, vocabulary=600, end_of_text=END, algorithm=algorithm)

    cut = fingerprint()
    monkeypatch.setattr("manta.data.tokenizer.train._cut_long_words", lambda words: words)
    assert fingerprint() == cut


def test_unigram_never_encodes_text_as_a_special_token(tmp_path):
    tokenizer = trained(tmp_path, "unigram", ["xyz"], end_of_text="eos")
    assert tokenizer.decode([tokenizer.end_of_text]) == "eos"
    assert len(tokenizer.encode(["eos"])[0]) == 3


def segmentations(word: bytes, pieces: list[bytes], *, whole: bool = True) -> list[list[int]]:
    """Return all segmentations of a word, by brute force."""
    if not word:
        return [[]]
    heads = [i for i, piece in enumerate(pieces) if word.startswith(piece) and (whole or piece != word)]
    return [[head, *rest] for head in heads for rest in segmentations(word[len(pieces[head]) :], pieces)]


def test_unigram_expectations_equal_a_brute_force_sum():
    pieces = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b"bc", b"cab", b"aa", b"\x00\xff"]
    words, counts = [b"abcab", b"a", b"\x00\xff\x00", b"aaaa", b"bcabc"], np.array([3, 1, 2, 5, 4])
    generator = np.random.default_rng(1)
    probabilities = generator.random(len(pieces))
    probabilities /= probabilities.sum()
    expected, best = np.zeros(len(pieces)), []
    for word, count in zip(words, counts, strict=True):
        weights = {tuple(path): math.prod(probabilities[path]) for path in segmentations(word, pieces)}
        best.append(math.log(max(weights.values())))
        for path, weight in weights.items():
            np.add.at(expected, list(path), count * weight / sum(weights.values()))
    lattice = unigram._Lattice.of(words, pieces)
    assert lattice.expected(probabilities, counts) == pytest.approx(expected)
    assert lattice.best(np.log(probabilities)) == pytest.approx(best)
    others = unigram._Lattice.of(pieces[256:], pieces, whole=False).best(np.log(probabilities))
    by_hand = [max(math.prod(probabilities[path]) for path in segmentations(piece, pieces, whole=False)) for piece in pieces[256:]]
    assert others == pytest.approx(np.log(by_hand))


def test_pruning_keeps_the_useful_pieces():
    words = Counter({b" unhappy": 50, b" happy": 80, b" unkind": 60, b" kind": 90, b" kindness": 30, b" happiness": 5})
    seeds = {word[i:j] for word in words for i in range(len(word)) for j in range(i + 2, len(word) + 1)}
    pieces = unigram.fit(words, seeds, size=256 + 6)
    chosen = {piece for piece, _ in pieces if len(piece) > 1}
    assert len(chosen) <= 6
    assert {b" kind", b" happy"} <= chosen
    assert {piece for piece, _ in pieces} >= {bytes([byte]) for byte in range(256)}
    scores = [score for _, score in pieces]
    assert all(a >= b for a, b in pairwise(scores))
    assert sum(math.exp(score) for score in scores) == pytest.approx(1, abs=1e-3)


def test_long_words_of_rare_letters_do_not_underflow():
    words = {bytes(range(256)) * 4: 1, b"a" * 1000: 10**9}
    scores = dict(unigram.fit(words, [b"aa", b"a" * 16, b"xy"], size=300))
    assert all(math.isfinite(score) for score in scores.values())
    assert scores[b"a" * 16] > scores[b"aa"]


def test_training_uses_the_most_frequent_words(monkeypatch):
    monkeypatch.setattr(unigram, "_TRAINING_BYTES", 40)
    parts, counts = unigram._training_words({b"x" * 40: 9, b"often": 7, b"once": 1, b"never": 0, **{b"w%03d" % i: 2 for i in range(99)}})
    assert set(parts) == {b"x" * 32, b"x" * 8}
    assert counts.tolist() == [9, 9]
    monkeypatch.setattr(unigram, "_TRAINING_BYTES", 80)
    parts, counts = unigram._training_words({b"often": 7, b"once": 1, **{b"w%03d" % i: 2 for i in range(99)}})
    assert parts[0] == b"often"
    assert counts.tolist() == [7] + [2] * 18
    assert parts[1:] != sorted(parts[1:])  # not only the first in alphabetical order


def test_a_trained_file_survives_a_round_trip():
    from tokenizers import Tokenizer as Reference

    for algorithm in ALGORITHMS:
        content = train(TEXTS[:4], vocabulary=300, end_of_text=END, algorithm=algorithm)
        assert Reference.from_str(content).to_str(pretty=True) == content
        assert [token["content"] for token in json.loads(content)["added_tokens"]] == [END, "[UNK]"][: 1 + (algorithm == "wordpiece")]
