"""Masked examples: pairs and texts with masked tokens, exactly as the papers define."""

import numpy as np
import pytest
from example_cases import BEGINS_WORD, CLS, END, MASK, PAD, SEP, SPECIAL, V, bins, digest, near, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.data.hashing import fold, hashed
from manta.data.objectives.examples import IGNORED, Examples, merge_documents, number_documents, sample_keys
from manta.data.objectives.masked import draw_pairs, frame_next_sentence, frame_sentence_order, frame_text, mask_tokens
from manta.data.shards.windows import Windows
from manta.data.tokenizer.tokenizer import SpecialTokens


def make(seed: int | None, numbers: np.ndarray, text_NW: np.ndarray, share: float = 0.15) -> Examples:
    """Return masked examples of windows [N] of text; sample g has window g % N."""
    windows = numbers % len(text_NW)
    keys = sample_keys(numbers, seed)
    following, label = draw_pairs(keys, windows, len(text_NW))
    text = Windows(tokens=text_NW[windows], second=text_NW[following], next_sentence=label)
    framed = frame_next_sentence(text, numbers, keys, SPECIAL)
    return mask_tokens(framed, keys, share=share, special=SPECIAL)


def unmasked(examples: Examples) -> np.ndarray:
    return np.where(examples.targets == IGNORED, examples.tokens, examples.targets)


@settings(deadline=None)
@given(seed=st.integers(0, 2**63 - 1), first=st.integers(0, 2**50), width=st.integers(2, 40), count=st.integers(1, 4))
def test_a_pair_is_the_start_of_a_window_and_the_end_of_one(seed, first, width, count):
    numbers = np.arange(first, first + 12)
    text_NW = np.random.default_rng(width).permuted(np.tile(np.arange(PAD + 1, PAD + 1 + width), (count, 1)), axis=1)
    text_NW += 50 * np.arange(count)[:, None]  # no token is in two windows
    windows = numbers % count
    keys = sample_keys(numbers, seed)
    following, label = draw_pairs(keys, windows, count)
    special = SpecialTokens(end_of_text=END, cls=CLS, sep=SEP, mask=MASK, pad=PAD, is_text=np.arange(300) > PAD)
    text = Windows(tokens=text_NW[windows], second=text_NW[following], next_sentence=label)
    framed = frame_next_sentence(text, numbers, keys, special)
    examples = mask_tokens(framed, keys, share=0.3, special=special)
    assert examples.tokens.shape == (12, width + 3)
    assert examples.positions.tolist() == [list(range(width + 3))] * 12
    for window, row, segments, label in zip(windows, unmasked(examples), examples.segments, examples.next_sentence, strict=True):
        (between, last) = np.flatnonzero(row == SEP)
        a, b = row[1:between], row[between + 1 : last]
        assert (row[0], last, len(a) + len(b)) == (CLS, width + 2, width)
        assert min(len(a), len(b)) >= max(1, width // 4)
        assert segments.tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert a.tolist() == text_NW[window, : len(a)].tolist()
        (other,) = [n for n in range(count) if b.tolist() == text_NW[n, len(a) :].tolist()]
        assert label == (other != window)


@settings(deadline=None)
@given(seed=st.integers(0, 2**63 - 1), share=st.floats(0.01, 0.99), ends=st.floats(0, 1), width=st.integers(2, 60))
def test_at_least_one_token_is_predicted_and_no_special_one(seed, share, ends, width):
    rng = np.random.default_rng(0)
    text_NW = np.where(rng.random((8, width)) < ends, END, rng.integers(PAD + 1, V, (8, width)))
    examples = make(seed, np.arange(8), text_NW, share)
    ordinary = unmasked(examples) > PAD
    predicted = examples.targets != IGNORED
    assert not (predicted & ~ordinary).any()
    total = ordinary.sum(axis=1)
    assert (abs(predicted.sum(axis=1) - share * total)[total * share >= 0.5] <= 0.5 + 1e-9).all()
    assert (predicted.sum(axis=1)[(total > 0) & (total * share < 0.5)] == 1).all()
    assert not predicted[total == 0].any()
    assert not np.isin(examples.tokens, [CLS, SEP, END, PAD])[predicted].any()


@pytest.fixture(scope="module")
def many() -> Examples:
    text_NW = np.random.default_rng(1).integers(PAD + 1, V, (64, 197))
    return make(11, np.arange(10_000), text_NW)


def test_15_percent_are_predicted_80_masked_10_replaced_10_kept(many):
    predicted = many.targets != IGNORED
    assert predicted.sum(axis=1).tolist() == [30] * 10_000  # of 197
    shown, wanted = many.tokens[predicted], many.targets[predicted]
    assert near(shown == MASK, 0.8)
    unchanged = 0.1 / (V - PAD - 1)  # a random replacement may equal the token
    assert near(shown == wanted, 0.1 + unchanged)
    assert near((shown != MASK) & (shown != wanted), 0.1 - unchanged)
    replaced = np.bincount(shown[(shown != MASK) & (shown != wanted)], minlength=V)
    assert not replaced[: PAD + 1].any()
    expected = replaced.sum() / (V - PAD - 1)
    assert (abs(replaced[PAD + 1 :] - expected) < 5 * np.sqrt(expected)).all()


def test_targets_are_uniform_and_independent_of_being_masked(many):
    predicted = many.targets != IGNORED
    middle = predicted[:, 1:-1]
    share = middle.mean(axis=0)[:40]  # before the first possible [SEP]
    assert (abs(share - 30 / 197) < 5 * np.sqrt(0.15 * 0.85 / len(predicted))).all()
    both = predicted[:, 1:-2] & predicted[:, 2:-1]
    hidden = many.tokens == MASK
    assert near(hidden[:, 2:-1][both & hidden[:, 1:-2]], 0.8)
    assert near(hidden[:, 2:-1][both & ~hidden[:, 1:-2]], 0.8)


def test_half_of_the_pairs_follow_and_the_others_are_uniform():
    numbers = np.arange(70_000)
    windows = numbers % 8
    following, label = draw_pairs(sample_keys(numbers, 3), windows, 8)
    assert near(label == 0, 0.5)
    assert np.array_equal(label == 0, following == windows)
    distance = (following - windows)[label == 1] % 8
    assert all(near(distance == d, 1 / 7) for d in range(1, 8))


@pytest.mark.parametrize(
    ("seed", "share", "width", "count", "golden"),
    [
        (11, 0.15, 125, 40, "8cca3c8e784fff20"),
        (2**63 + 5, 0.4, 2, 3, "4cda920b67375673"),
        (None, 0.15, 61, 1, "eede24dab0c6ded3"),
        (None, 0.8, 30, 7, "50cb24a582b7be69"),
    ],
)
def test_pairs_are_frozen(seed, share, width, count, golden):
    text_NW = np.random.RandomState(width).randint(0, V, (count, width))
    text_NW[:, ::9] = END
    assert digest(make(seed, np.arange(10**12, 10**12 + 60), text_NW, share)) == golden


def frame(kind: str, text_KW: np.ndarray, documents_KW: np.ndarray | None = None, *, seed: int | None = 5, special=SPECIAL) -> Examples:
    """Frame each window. Part B of a next-sentence pair is from a window that `draw_pairs` chooses."""
    numbers = np.arange(len(text_KW))
    keys = sample_keys(numbers, seed)
    if kind == "next_sentence":
        following, label = draw_pairs(keys, numbers, len(numbers))
        documents = None if documents_KW is None else (documents_KW, documents_KW[following])
        windows = Windows(tokens=text_KW, second=text_KW[following], next_sentence=label)
        return frame_next_sentence(windows, numbers, keys, special, documents)
    if kind == "sentence_order":
        return frame_sentence_order(text_KW, numbers, keys, special, documents_KW)
    return frame_text(text_KW, numbers, special, documents_KW)


def parts(row: np.ndarray) -> tuple[list[int], list[int]]:
    """Return A and B of a pair's tokens."""
    (between, last) = np.flatnonzero(row == SEP)
    assert (row[0], last) == (CLS, len(row) - 1)
    return row[1:between].tolist(), row[between + 1 : last].tolist()


@settings(deadline=None)
@given(seed=st.none() | st.integers(0, 2**63), width=st.integers(2, 40))
def test_the_parts_of_a_window_are_in_order_or_swapped(seed, width):
    text_KW = np.tile(np.arange(10, 10 + width), (20, 1))
    framed = frame("sentence_order", text_KW, seed=seed)
    assert framed.documents is None
    for row, segments, label in zip(framed.tokens, framed.segments, framed.next_sentence, strict=True):
        a, b = parts(row)
        assert min(len(a), len(b)) >= max(1, width // 4)
        assert (b + a if label else a + b) == text_KW[0].tolist()
        assert segments.tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1)


def test_half_of_the_parts_are_swapped_with_the_same_lengths():
    framed = frame("sentence_order", np.tile(np.arange(10, 50), (20_000, 1)))
    assert near(framed.next_sentence == 1, 0.5)
    lengths = (framed.segments == 0).sum(axis=1) - 2
    for swapped in (0, 1):
        counts = np.bincount(lengths[framed.next_sentence == swapped], minlength=31)[10:]
        expected = counts.sum() / 21
        assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()


@settings(deadline=None)
@given(
    ends=st.floats(0, 0.6), width=st.integers(2, 30), kind=st.sampled_from(["next_sentence", "sentence_order"]), seed=st.integers(0, 2**60)
)
def test_documents_that_meet_in_a_pair_are_joined(ends, width, kind, seed):
    rng = np.random.default_rng(seed)
    text_KW = 1000 * np.arange(1, 9)[:, None] + np.arange(width)  # each token identifies its window and position
    ends_KW = rng.random(text_KW.shape) < ends
    numbers_KW = number_documents(np.where(ends_KW, END, text_KW), END)
    special = SpecialTokens(end_of_text=END, cls=CLS, sep=SEP, mask=MASK, pad=PAD, is_text=np.arange(10_000) > PAD)
    framed = frame(kind, text_KW, numbers_KW, seed=seed, special=special)
    for row, documents, label in zip(framed.tokens, framed.documents, framed.next_sentence, strict=True):
        a, b = parts(row)
        before, after = (b, a) if kind == "sentence_order" and label else (a, b)
        document_of = {token: (token // 1000, numbers_KW[token // 1000 - 1, token % 1000]) for token in a + b}
        meeting = {document_of[before[-1]], document_of[after[0]]}
        owners = [
            "pair" if token in {CLS, SEP} or document_of[token] in meeting else (token in a, *document_of[token]) for token in row.tolist()
        ]
        for i, owner in enumerate(owners):
            assert [other == owner for other in owners] == (documents == documents[i]).tolist()
    whole = frame(kind, text_KW, seed=seed, special=special)
    assert whole.documents is None
    assert np.array_equal(whole.tokens, framed.tokens)


def test_framed_text_by_hand():
    text_KW, documents_KW = bins([[10, 11, END], [12, END]], [[10, 11, 12, 13, 14, 15, END]], width=7)
    first, second = rows(mask_tokens(frame("none", text_KW, documents_KW), sample_keys(np.arange(2), 5), share=0.01, special=SPECIAL))
    shown = unmasked(mask_tokens(frame("none", text_KW, documents_KW), sample_keys(np.arange(2), 5), share=0.01, special=SPECIAL)).tolist()
    assert shown == [[CLS, 10, 11, END, 12, END, SEP, PAD, PAD], [CLS, 10, 11, 12, 13, 14, 15, END, SEP]]
    assert first["documents"] == [0, 0, 0, 0, 1, 1, 1, -1, -1]
    assert second["documents"] == [0] * 9
    assert first["positions"] == list(range(9))
    assert first["segments"] is first["next_sentence"] is None
    assert frame("none", text_KW, merge_documents(documents_KW)).documents.tolist() == [[0] * 7 + [-1] * 2, [0] * 9]
    cut = frame("none", text_KW)
    assert cut.documents is None
    assert cut.tokens.tolist() == [[CLS, *text, SEP] for text in text_KW.tolist()]


def words(framed: Examples, row: int) -> list[list[int]]:
    """Return the columns of each word of a row, by definition."""
    found: list[list[int]] = []
    documents = np.zeros_like(framed.tokens) if framed.documents is None else framed.documents
    for column, token in enumerate(framed.tokens[row].tolist()):
        if token <= PAD:
            continue
        continues = framed.tokens[row, column - 1] > PAD and documents[row, column - 1] == documents[row, column]
        if continues and not BEGINS_WORD[token]:
            found[-1].append(column)
        else:
            found.append([column])
    return found


@settings(deadline=None)
@given(
    kind=st.sampled_from(["next_sentence", "sentence_order", "none", "padded"]),
    seed=st.integers(0, 2**60),
    share=st.floats(0.01, 0.99),
    width=st.integers(2, 40),
    ids=st.sampled_from([(0, V), (5, V), (7, 9)]),  # with ends of text, without, and a single word that never ends
)
def test_whole_words_are_chosen_in_the_order_of_their_hashes(kind, seed, share, width, ids):
    rng = np.random.default_rng(seed)
    text_KW = rng.integers(*ids, (6, width))
    text_KW[np.isin(text_KW, [CLS, SEP, MASK, PAD])] = END
    documents_KW = np.cumsum(rng.random((6, width)) < 0.1, axis=1)  # some start without an end-of-text token before them
    if kind == "padded":
        documents_KW[:, width // 2 :] = -1
    framed = frame(kind if kind != "padded" else "none", text_KW, documents_KW, seed=seed)
    keys = sample_keys(np.arange(6), seed)
    examples = mask_tokens(framed, keys, share=share, special=SPECIAL, whole_words=True)
    assert np.array_equal(unmasked(examples), framed.tokens)
    for row, targets in enumerate(examples.targets):
        found = words(framed, row)
        count = max(1, round(share * sum(map(len, found))))
        fit = [word for word in found if len(word) <= count] or [word[:count] for word in found]
        expected: list[int] = []
        for word in sorted(fit, key=lambda word: int(fold(fold(keys[row : row + 1], 3), word[0])[0])):
            if len(expected) + len(word) > count:
                break
            expected += word
        assert np.flatnonzero(targets != IGNORED).tolist() == sorted(expected)
        assert bool(expected) == bool(found)


def test_tokens_of_whole_words_80_masked_10_replaced_10_kept():
    text_NW = np.random.default_rng(1).integers(PAD + 1, V, (4000, 126))
    framed = frame("none", text_NW)
    examples = mask_tokens(framed, sample_keys(np.arange(4000), 5), share=0.15, special=SPECIAL, whole_words=True)
    predicted = examples.targets != IGNORED
    assert predicted.sum(axis=1).max() == 19, "15 percent of 126"
    assert predicted.sum(axis=1).mean() > 19 - 3, (
        "a word has three tokens on average, so the first that does not fit leaves at most that many"
    )
    shown, wanted = examples.tokens[predicted], examples.targets[predicted]
    unchanged = 0.1 / (V - PAD - 1)
    assert near(shown == MASK, 0.8)
    assert near(shown == wanted, 0.1 + unchanged)
    inside = predicted & ~BEGINS_WORD[framed.tokens]
    hidden = examples.tokens == MASK
    assert near(hidden[:, 1:][inside[:, 1:] & predicted[:, :-1] & hidden[:, :-1]], 0.8)
    again = mask_tokens(framed, sample_keys(np.arange(4000) + 4000, 5), share=0.15, special=SPECIAL, whole_words=True)
    assert ((again.targets != examples.targets).any(axis=1)).all()


@pytest.mark.parametrize(
    ("kind", "whole_words", "golden"),
    [
        ("sentence_order", False, "991e192329987ce6"),
        ("none", False, "0fe58c9801166363"),
        ("none", True, "7ad60f00b30ab5be"),
        ("next_sentence", True, "1c6d68e0d484d543"),
    ],
)
def test_other_frames_are_frozen(kind, whole_words, golden):
    text_KW = np.random.RandomState(3).randint(PAD + 1, V, (40, 61))
    text_KW[:, ::9] = END
    framed = frame(kind, text_KW, number_documents(text_KW, END), seed=11)
    assert digest(mask_tokens(framed, sample_keys(np.arange(40), 11), share=0.15, special=SPECIAL, whole_words=whole_words)) == golden


def test_hashes_and_examples_are_frozen():
    """Golden: a change would change every started run with a masked objective."""
    assert hashed(1, 2, np.array([3, 4])).tolist() == [8566811186491711777, 10240744290557228159]
    assert np.array_equal(fold(hashed(1, 2), np.array([3, 4])), hashed(1, 2, np.array([3, 4])))
    (row,) = rows(make(5, np.array([29]), np.arange(10, 43).reshape(3, 11), share=0.5))
    _ = IGNORED
    assert row["tokens"] == [CLS, 32, 33, 36, 35, MASK, SEP, 15, 16, 37, 18, MASK, MASK, SEP]
    assert row["targets"] == [_, _, _, 34, _, 36, _, _, 16, 17, _, 19, 20, _]
    assert row["next_sentence"] == 1
