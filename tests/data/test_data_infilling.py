"""Filling in the middle: documents whose middle stands at their end, and nothing else changed."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_objectives import DOCUMENTS, END, ONLY, bins, near, rows

from manta.data.objectives.causal import causal_examples, fill_in_the_middle
from manta.data.objectives.examples import IGNORED, sample_keys
from manta.data.tokenizer.tokenizer import FimTokens

PREFIX, SUFFIX, MIDDLE = 1, 2, 3
MARKS = FimTokens(prefix=PREFIX, suffix=SUFFIX, middle=MIDDLE)


def fill(text_KW: np.ndarray, documents_KW: np.ndarray, *, seed: int | None = 5, rate: float = 1.0, suffix_first: float = 0.5):
    keys = sample_keys(np.arange(len(text_KW)), seed)
    return fill_in_the_middle(text_KW, documents_KW, keys, rate=rate, suffix_first=suffix_first, marks=MARKS, end_of_text=END)


def restored(document: list[int]) -> list[int]:
    """A document before its middle was moved; as it is, where it was not."""
    if document[0] != PREFIX:
        return document
    suffix, middle = document.index(SUFFIX), document.index(MIDDLE)
    rest = document[middle + 1 :]  # the middle; where the suffix came first, with the prefix before it
    return document[1:suffix] + rest[:-1] + document[suffix + 1 : middle] + rest[-1:]


@settings(deadline=None)
@given(
    found=st.lists(DOCUMENTS, min_size=1, max_size=3),
    seed=st.none() | st.integers(0, 2**63),
    rate=st.floats(0.05, 1),
    order=st.floats(0, 1),
)
def test_a_document_whose_middle_is_moved_keeps_its_tokens_in_its_place(found, seed, rate, order):
    text_KW, documents_KW = bins(*found, width=100)
    filled_KW, numbers_KW = fill(text_KW, documents_KW, seed=seed, rate=rate, suffix_first=order)
    assert filled_KW.shape == numbers_KW.shape == text_KW.shape
    for whole, text, numbers in zip(found, filled_KW, numbers_KW, strict=True):
        assert (np.diff(numbers[numbers >= 0]) >= 0).all()
        assert text[numbers == -1].tolist() == [END] * (numbers == -1).sum()
        assert (numbers[(numbers >= 0).sum() :] == -1).all()
        for number, document in enumerate(whole):
            moved = text[numbers == number].tolist()
            assert restored(moved) == document
            assert sorted(token for token in moved if token not in {PREFIX, SUFFIX, MIDDLE}) == sorted(document)
            assert len(moved) - len(document) == (3 if moved[0] == PREFIX else 0)
            assert moved[0] != PREFIX or len(document) > 3
            assert rate < 1 or (moved[0] == PREFIX) == (len(document) > 3)


@settings(deadline=None)
@given(found=st.lists(DOCUMENTS, min_size=1, max_size=3), width=st.integers(2, 40))
def test_what_the_marks_push_out_falls_off_the_end_of_the_window(found, width):
    """A window that ends in the midst of a document is filled as if it had room, and cut again."""
    text_KW, documents_KW = (whole[:, :width] for whole in bins(*found, width=100))
    wide_2KW = (
        np.concatenate([text_KW, np.full((len(found), 40), END)], 1),
        np.concatenate([documents_KW, np.full((len(found), 40), -1)], 1),
    )
    for ours, wide in zip(fill(text_KW, documents_KW), fill(*wide_2KW), strict=True):
        assert ours.tolist() == wide[:, :width].tolist()


def test_filling_by_hand():
    """These values may never change: whoever changes them changes every run that is under way."""
    text_KW, documents_KW = bins([[11, 12, 13, 14, 15, 16, END], [21, 22, END], [31, 32, 33]], width=19)
    (text,), (numbers,) = fill(text_KW, documents_KW, suffix_first=0.0, seed=38)
    assert text.tolist() == [PREFIX, 11, 12, 13, SUFFIX, 15, 16, MIDDLE, 14, END, 21, 22, END, PREFIX, 31, SUFFIX, 33, MIDDLE, 32]
    assert numbers.tolist() == [0] * 10 + [1] * 3 + [2] * 6
    (text,), (again,) = fill(text_KW, documents_KW, suffix_first=1.0, seed=38)
    assert text.tolist() == [PREFIX, SUFFIX, 15, 16, MIDDLE, 11, 12, 13, 14, END, 21, 22, END, PREFIX, SUFFIX, 33, MIDDLE, 31, 32]
    assert again.tolist() == numbers.tolist()


def test_no_rate_changes_nothing():
    text_KW, documents_KW = bins([[11, 12, 13, 14, 15, 16, END]], width=9)
    assert all(ours is given for ours, given in zip(fill(text_KW, documents_KW, rate=0.0), (text_KW, documents_KW), strict=True))


def test_of_no_samples_there_are_no_examples():
    text_KW, documents_KW = fill(np.empty((0, 9), dtype=np.int64), np.empty((0, 9), dtype=np.int64))
    assert text_KW.shape == documents_KW.shape == (0, 9)
    assert causal_examples(text_KW, np.arange(0), documents_KW).tokens.shape == (0, 8)


def test_documents_are_filled_at_the_rate_given_at_places_drawn_evenly_and_half_of_them_suffix_first():
    text_KW, documents_KW = bins(*[[[10, 11, 12, 13, END]] * 4] * 5000, width=40)
    filled_KW, numbers_KW = fill(text_KW, documents_KW, rate=0.3)
    moved = [filled[numbers == number].tolist() for filled, numbers in zip(filled_KW, numbers_KW, strict=True) for number in range(4)]
    assert near(np.array([document[0] == PREFIX for document in moved]), 0.3)
    chosen = [document for document in moved if document[0] == PREFIX]
    assert near(np.array([document[1] == SUFFIX for document in chosen]), 0.5 + 0.5 * 9 / 25)  # or with an empty prefix
    suffixes = np.array([document.index(MIDDLE) - document.index(SUFFIX) - 1 for document in chosen])
    for length in range(5):  # of the larger of two places in 0 to 4, that is 4 - length
        assert near(suffixes == length, (2 * (4 - length) + 1) / 25)
    neighbours = np.array([document[0] == PREFIX for document in moved]).reshape(-1, 4)
    assert near(neighbours[:, 1] & neighbours[:, 0], 0.09)
    again, other, held_out = (fill(text_KW, documents_KW, rate=0.3, seed=seed)[0] for seed in (5, 6, None))
    assert np.array_equal(again, filled_KW)
    assert not np.array_equal(other, filled_KW)
    assert not np.array_equal(held_out, filled_KW)


def test_filled_documents_are_kept_apart_as_others_are():
    _ = IGNORED
    text_KW, documents_KW = bins([[11, 12, 13, 14, 15, 16, END], [21, 22, END]], width=16)
    filled_KW, numbers_KW = fill(text_KW, documents_KW, suffix_first=0.0, seed=38)
    (row,) = rows(causal_examples(filled_KW, ONLY, numbers_KW))
    assert row["tokens"] == [PREFIX, 11, 12, 13, SUFFIX, 15, 16, MIDDLE, 14, END, 21, 22, END, END, END]
    assert row["targets"] == [11, 12, 13, SUFFIX, 15, 16, MIDDLE, 14, END, _, 22, END, _, _, _]
    assert row["positions"] == [*range(10), 0, 1, 2, 0, 1]
