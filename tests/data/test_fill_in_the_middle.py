"""Fill-in-the-middle moves the middle of documents to their end, and changes nothing else."""

import numpy as np
from example_cases import DOCUMENTS, END, ONLY, bins, near, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.data.objectives.causal import causal_examples, fill_in_the_middle
from manta.data.objectives.examples import IGNORED, sample_keys
from manta.data.tokenizer.tokenizer import FimTokens

PREFIX, SUFFIX, MIDDLE = 1, 2, 3
MARKS = FimTokens(prefix=PREFIX, suffix=SUFFIX, middle=MIDDLE)


def fill(text_KW: np.ndarray, documents_KW: np.ndarray, *, seed: int | None = 5, rate: float = 1.0, suffix_first: float = 0.5):
    keys = sample_keys(np.arange(len(text_KW)), seed)
    return fill_in_the_middle(text_KW, documents_KW, keys, rate=rate, suffix_first=suffix_first, marks=MARKS, end_of_text=END)


def restore(document: list[int]) -> list[int]:
    """Return a document before its middle was moved, if it was."""
    if document[0] != PREFIX:
        return document
    suffix, middle = document.index(SUFFIX), document.index(MIDDLE)
    rest = document[middle + 1 :]  # the middle, after the prefix if the suffix is first
    return document[1:suffix] + rest[:-1] + document[suffix + 1 : middle] + rest[-1:]


@settings(deadline=None)
@given(
    found=st.lists(DOCUMENTS, min_size=1, max_size=3),
    seed=st.none() | st.integers(0, 2**63),
    rate=st.floats(0.05, 1),
    order=st.floats(0, 1),
)
def test_a_transformed_document_keeps_its_tokens_and_its_place(found, seed, rate, order):
    text_KW, documents_KW = bins(*found, width=100)
    filled_KW, numbers_KW = fill(text_KW, documents_KW, seed=seed, rate=rate, suffix_first=order)
    assert filled_KW.shape == numbers_KW.shape == text_KW.shape
    for whole, text, numbers in zip(found, filled_KW, numbers_KW, strict=True):
        assert (np.diff(numbers[numbers >= 0]) >= 0).all()
        assert text[numbers == -1].tolist() == [END] * (numbers == -1).sum()
        assert (numbers[(numbers >= 0).sum() :] == -1).all()
        for number, document in enumerate(whole):
            moved = text[numbers == number].tolist()
            assert restore(moved) == document
            assert sorted(token for token in moved if token not in {PREFIX, SUFFIX, MIDDLE}) == sorted(document)
            assert len(moved) - len(document) == (3 if moved[0] == PREFIX else 0)
            assert moved[0] != PREFIX or len(document) > 3
            assert rate < 1 or (moved[0] == PREFIX) == (len(document) > 3)


@settings(deadline=None)
@given(found=st.lists(DOCUMENTS, min_size=1, max_size=3), width=st.integers(2, 40))
def test_tokens_pushed_beyond_the_window_are_lost(found, width):
    """A window that ends inside a document is transformed as if it were longer, and cut."""
    text_KW, documents_KW = (whole[:, :width] for whole in bins(*found, width=100))
    wide_2KW = (
        np.concatenate([text_KW, np.full((len(found), 40), END)], 1),
        np.concatenate([documents_KW, np.full((len(found), 40), -1)], 1),
    )
    for narrow, wide in zip(fill(text_KW, documents_KW), fill(*wide_2KW), strict=True):
        assert narrow.tolist() == wide[:, :width].tolist()


def test_fill_in_the_middle_by_hand():
    """Golden: a change would change every started run."""
    text_KW, documents_KW = bins([[11, 12, 13, 14, 15, 16, END], [21, 22, END], [31, 32, 33]], width=19)
    (text,), (numbers,) = fill(text_KW, documents_KW, suffix_first=0.0, seed=38)
    assert text.tolist() == [PREFIX, 11, 12, 13, SUFFIX, 15, 16, MIDDLE, 14, END, 21, 22, END, PREFIX, 31, SUFFIX, 33, MIDDLE, 32]
    assert numbers.tolist() == [0] * 10 + [1] * 3 + [2] * 6
    (text,), (again,) = fill(text_KW, documents_KW, suffix_first=1.0, seed=38)
    assert text.tolist() == [PREFIX, SUFFIX, 15, 16, MIDDLE, 11, 12, 13, 14, END, 21, 22, END, PREFIX, SUFFIX, 33, MIDDLE, 31, 32]
    assert again.tolist() == numbers.tolist()


def test_rate_0_changes_nothing():
    text_KW, documents_KW = bins([[11, 12, 13, 14, 15, 16, END]], width=9)
    assert all(output is text for output, text in zip(fill(text_KW, documents_KW, rate=0.0), (text_KW, documents_KW), strict=True))


def test_no_samples_make_no_examples():
    text_KW, documents_KW = fill(np.empty((0, 9), dtype=np.int64), np.empty((0, 9), dtype=np.int64))
    assert text_KW.shape == documents_KW.shape == (0, 9)
    assert causal_examples(text_KW, np.arange(0), documents_KW).tokens.shape == (0, 8)


def test_rate_cuts_and_suffix_first_have_their_distributions():
    text_KW, documents_KW = bins(*[[[10, 11, 12, 13, END]] * 4] * 5000, width=40)
    filled_KW, numbers_KW = fill(text_KW, documents_KW, rate=0.3)
    moved = [filled[numbers == number].tolist() for filled, numbers in zip(filled_KW, numbers_KW, strict=True) for number in range(4)]
    assert near(np.array([document[0] == PREFIX for document in moved]), 0.3)
    chosen = [document for document in moved if document[0] == PREFIX]
    assert near(np.array([document[1] == SUFFIX for document in chosen]), 0.5 + 0.5 * 9 / 25)  # or with an empty prefix
    suffixes = np.array([document.index(MIDDLE) - document.index(SUFFIX) - 1 for document in chosen])
    for length in range(5):  # 4 minus the larger of two cuts in 0 to 4
        assert near(suffixes == length, (2 * (4 - length) + 1) / 25)
    neighbours = np.array([document[0] == PREFIX for document in moved]).reshape(-1, 4)
    assert near(neighbours[:, 1] & neighbours[:, 0], 0.09)
    again, other, held_out = (fill(text_KW, documents_KW, rate=0.3, seed=seed)[0] for seed in (5, 6, None))
    assert np.array_equal(again, filled_KW)
    assert not np.array_equal(other, filled_KW)
    assert not np.array_equal(held_out, filled_KW)


def test_transformed_documents_can_be_separated():
    _ = IGNORED
    text_KW, documents_KW = bins([[11, 12, 13, 14, 15, 16, END], [21, 22, END]], width=16)
    filled_KW, numbers_KW = fill(text_KW, documents_KW, suffix_first=0.0, seed=38)
    (row,) = rows(causal_examples(filled_KW, ONLY, numbers_KW))
    assert row["tokens"] == [PREFIX, 11, 12, 13, SUFFIX, 15, 16, MIDDLE, 14, END, 21, 22, END, END, END]
    assert row["targets"] == [11, 12, 13, SUFFIX, 15, 16, MIDDLE, 14, END, _, 22, END, _, _, _]
    assert row["positions"] == [*range(10), 0, 1, 2, 0, 1]
