"""Tokenizers of three kinds, trained: the same file each time, no text that they can not spell, and no text that spells their marks."""

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
from manta.data.tokenizer import tokenizer, unigram
from manta.data.tokenizer.tokenizer import Tokenizer
from manta.data.tokenizer.train import train as train_tokenizer

ALGORITHMS = ["bpe", "wordpiece", "unigram"]
TEXTS = [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:12]]
END = "<|endoftext|>"


def trained(directory: Path, algorithm: str, texts: list[str] = TEXTS, **how) -> Tokenizer:
    path = directory / f"{algorithm}.json"
    content = train_tokenizer(texts, algorithm=algorithm, **{"vocabulary": 600, "end_of_text": END, "marks": tokenizer.MARKS, **how})
    path.write_text(content, encoding="utf-8")
    return Tokenizer(path, end_of_text=how.get("end_of_text", END))


def test_the_same_texts_give_the_same_file_on_any_number_of_cores():
    """Each process has hash maps of its own order. Rare letters all stand as often: which of them are kept is a matter of order, too."""
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
    told = [
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "RAYON_NUM_THREADS": cores}, capture_output=True, text=True, check=True
        ).stdout.split()
        for cores in ("1", "3")
    ]
    assert len(set(told[0])) == len(ALGORITHMS)
    assert told[0] == told[1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_vocabulary_has_the_size_asked_for_and_the_marks_first(tmp_path, algorithm):
    opened = trained(tmp_path, algorithm)
    special = opened.special_tokens()
    assert opened.vocabulary == 600
    assert (special.end_of_text, special.cls, special.sep, special.mask, special.pad) == (0, 1, 2, 3, 4)
    others = [5] if algorithm == "wordpiece" else []
    assert np.flatnonzero(~special.is_text).tolist() == [0, 1, 2, 3, 4, *others]
    assert len(opened._reference.get_vocab()) == 600


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_small_corpus_fills_less_of_a_vocabulary(tmp_path, algorithm):
    for texts in ([], ["a"], ["one two three"] * 9):
        opened = trained(tmp_path, algorithm, texts, vocabulary=1000)
        assert opened.vocabulary < 300
        assert opened.encode(texts) is not None


@pytest.fixture(scope="module")
def byte_unigram(tmp_path_factory) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("unigram"), "unigram")


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back_from_unigram_pieces(byte_unigram, text):
    (ids,) = byte_unigram.encode([text])
    assert byte_unigram.decode(ids) == text
    assert byte_unigram.special_tokens().is_text[ids].all()


def test_unigram_pieces_spell_control_characters_emoji_and_marks(byte_unigram):
    assert byte_unigram._spec["model"]["unk_id"] is None
    texts = [
        "".join(map(chr, range(0x250))),
        "🙂👩‍👩‍👧\U0010ffff",
        "\r\n\t \u2028",
        " ".join([END, *tokenizer.MARKS]),
        "x" * 10_000,
        " " * 10_000,
    ]
    for text, ids in zip(texts, byte_unigram.encode(texts), strict=True):
        assert byte_unigram.decode(ids) == text
        assert min(ids) > 4


def test_unigram_pieces_cut_text_into_fewer_than_letters_and_more_evenly_than_merges(byte_unigram, tmp_path):
    """Of so small a vocabulary, the code of a text by its tokens' own frequencies is the shorter for pieces chosen to that end."""

    def bits(opened: Tokenizer) -> float:
        counts = np.bincount(np.concatenate(opened.encode(TEXTS)))
        counts = counts[counts > 0]
        return float(-(counts * np.log2(counts / counts.sum())).sum())

    size = sum(len(text.encode()) for text in TEXTS)
    assert sum(map(len, byte_unigram.encode(TEXTS))) < size / 2
    assert bits(byte_unigram) < 0.97 * bits(trained(tmp_path, "bpe"))


def test_word_pieces_are_made_as_bert_makes_them(tmp_path):
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


def test_rare_letters_leave_room_for_word_pieces(tmp_path):
    texts = ["abra cadabra " * 20, " ".join(chr(0x1200 + i) * 2 for i in range(500))]
    opened = trained(tmp_path, "wordpiece", texts, vocabulary=206)
    letters = {token for token in opened._reference.get_vocab() if len(token) == 1}
    assert opened.vocabulary == 206
    assert letters == {*"abcdr", *(chr(0x1200 + i) for i in range(95))}  # of equally frequent ones the first


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_end_of_text_that_a_text_may_spell_is_refused(tmp_path, algorithm):
    for name in ("z", "eos", *(["[UNK]"] if algorithm == "wordpiece" else [])):
        with pytest.raises(InputError) as caught:
            trained(tmp_path, algorithm, ["eos z eos"] * 9, end_of_text=name)
        wants = f"which text may spell; wants a token that is no word, as <|{name}|>"
        assert str(caught.value) == f"tokenizer.end_of_text: got {name!r}, {wants}"


def test_a_special_token_is_the_least_probable_of_unigram_pieces(tmp_path):
    opened = trained(tmp_path, "unigram", ["xyz"], end_of_text="eos")
    assert opened.decode([opened.end_of_text]) == "eos"
    assert len(opened.encode(["eos"])[0]) == 3


def cuts(word: bytes, pieces: list[bytes], *, whole: bool = True) -> list[list[int]]:
    """All ways to cut a word into pieces, one by one."""
    if not word:
        return [[]]
    heads = [i for i, piece in enumerate(pieces) if word.startswith(piece) and (whole or piece != word)]
    return [[head, *rest] for head in heads for rest in cuts(word[len(pieces[head]) :], pieces)]


def test_expectations_and_best_cuts_are_those_of_all_ways_to_cut_a_word():
    pieces = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b"bc", b"cab", b"aa", b"\x00\xff"]
    words, counts = [b"abcab", b"a", b"\x00\xff\x00", b"aaaa", b"bcabc"], np.array([3, 1, 2, 5, 4])
    generator = np.random.default_rng(1)
    probabilities = generator.random(len(pieces))
    probabilities /= probabilities.sum()
    expected, best = np.zeros(len(pieces)), []
    for word, count in zip(words, counts, strict=True):
        weights = {tuple(cut): math.prod(probabilities[cut]) for cut in cuts(word, pieces)}
        best.append(math.log(max(weights.values())))
        for cut, weight in weights.items():
            np.add.at(expected, list(cut), count * weight / sum(weights.values()))
    lattice = unigram._Lattice.of(words, pieces)
    assert lattice.expected(probabilities, counts) == pytest.approx(expected)
    assert lattice.best(np.log(probabilities)) == pytest.approx(best)
    others = unigram._Lattice.of(pieces[256:], pieces, whole=False).best(np.log(probabilities))
    by_hand = [max(math.prod(probabilities[cut]) for cut in cuts(piece, pieces, whole=False)) for piece in pieces[256:]]
    assert others == pytest.approx(np.log(by_hand))


def test_pruning_keeps_the_pieces_that_the_words_are_made_of():
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


def test_of_too_many_words_the_most_frequent_are_learnt_from(monkeypatch):
    monkeypatch.setattr(unigram, "_LEARNT_FROM", 40)
    parts, counts = unigram._learnt_from({b"x" * 40: 9, b"often": 7, b"once": 1, b"never": 0, **{b"w%03d" % i: 2 for i in range(99)}})
    assert set(parts) == {b"x" * 32, b"x" * 8}
    assert counts.tolist() == [9, 9]
    monkeypatch.setattr(unigram, "_LEARNT_FROM", 80)
    parts, counts = unigram._learnt_from({b"often": 7, b"once": 1, **{b"w%03d" % i: 2 for i in range(99)}})
    assert parts[0] == b"often"
    assert counts.tolist() == [7] + [2] * 18
    assert parts[1:] != sorted(parts[1:])  # not those of the first letters alone


def test_train_writes_a_file_that_tokenizers_reads_back_the_same():
    from tokenizers import Tokenizer as Reference

    for algorithm in ALGORITHMS:
        content = train_tokenizer(TEXTS[:4], vocabulary=300, end_of_text=END, algorithm=algorithm)
        assert Reference.from_str(content).to_str(pretty=True) == content
        assert [token["content"] for token in json.loads(content)["added_tokens"]] == [END, "[UNK]"][: 1 + (algorithm == "wordpiece")]
