"""Masked language modeling: text among special tokens, of which some tokens must be predicted.

`frame_next_sentence`, `frame_sentence_order` and `frame_text` put special tokens around text; `mask_tokens` then masks some of it. Both
depend on (text, seed, sample number) alone. Sample numbers keep rising from epoch to epoch, so a text is masked differently each time it
is read (RoBERTa's dynamic masking).
Legend: K examples, T sequence length, W tokens of text that an example is made of, N tokens of text in all, U words in all.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from manta.data.hashing import Hashes, fold
from manta.data.objectives.examples import IGNORED, PADDING, Examples, Tokens, integers_below
from manta.data.shards.windows import Windows
from manta.data.tokenizer.tokenizer import SpecialTokens

FRAME = {"next_sentence": 3, "sentence_order": 3, "none": 2}
"""Special tokens around an example's text, by data.pairs: T - W."""

_SPLIT, _NEXT, _OTHER, _CHOSEN, _ACTION, _REPLACEMENT, _SWAPPED = range(7)  # hash domains; `causal` has others


def draw_pairs(keys: Hashes, windows: NDArray[np.int64], count: ArrayLike) -> tuple[NDArray[np.int64], Tokens]:
    """Choose the window that part B of each pair is cut from: the window of part A, or any other, with even odds.

    windows [K]: those of part A, in range(count). Returns the windows of part B [K], and next_sentence [K]: 1 if it is another window. If
    there is only one window, B always follows A.
    """
    count = np.asarray(count, dtype=np.int64)
    next_sentence = np.where(count == 1, 0, integers_below(fold(keys, _NEXT), 2))
    others = (windows + 1 + integers_below(fold(keys, _OTHER), np.maximum(count - 1, 1))) % count
    return np.where(next_sentence == 1, others, windows), next_sentence


def frame_next_sentence(
    windows: Windows, samples: Tokens, keys: Hashes, special: SpecialTokens, documents: tuple[Tokens, Tokens] | None = None
) -> Examples:
    """Make BERT's pairs (Devlin et al. 2019, sections 3.1 and A.2): [CLS] A [SEP] B [SEP], T = W + 3.

    A is the start of a window. B is the rest of the window's `second` after a part of A's length. Each is at least a quarter of the
    text. With documents [K, W] of both, the last document of A and the first of B, which the question is about, count as one document
    together with [CLS] and both [SEP].
    """
    first_KW, second_KW, next_sentence = windows.tokens, windows.second, windows.next_sentence
    assert second_KW is not None
    assert next_sentence is not None
    lengths_K = _first_lengths(keys, first_KW.shape[1])
    framed = _frame_pair(first_KW, second_KW, lengths_K, samples, special)
    if documents is not None:
        joined_KW, meeting_K = _join_documents(*documents, lengths_K)
        framed = replace(framed, documents=_surround(joined_KW, joined_KW, lengths_K, meeting_K))
    return replace(framed, next_sentence=next_sentence)


def frame_sentence_order(
    tokens_KW: Tokens, samples: Tokens, keys: Hashes, special: SpecialTokens, documents_KW: Tokens | None = None
) -> Examples:
    """Make ALBERT's pairs (Lan et al. 2020, section 3.1): a window cut in two, [CLS] A [SEP] B [SEP], T = W + 3, swapped with even odds.

    next_sentence is 1 if they are swapped. Each part is at least a quarter of the text. With documents [K, W], those on both sides of the
    cut, whose order is in question, count as one document together with [CLS] and both [SEP].
    """
    rows_K1, width = np.arange(len(tokens_KW))[:, None], tokens_KW.shape[1]
    lengths_K, swapped_K = _first_lengths(keys, width), integers_below(fold(keys, _SWAPPED), 2)
    cuts_K = np.where(swapped_K == 1, width - lengths_K, lengths_K)
    columns_KW = (np.arange(width) + (swapped_K * cuts_K)[:, None]) % width
    tokens_KW = tokens_KW[rows_K1, columns_KW]
    framed = _frame_pair(tokens_KW, tokens_KW, lengths_K, samples, special)
    if documents_KW is not None:
        joined_KW, meeting_K = _join_documents(documents_KW, documents_KW, cuts_K)
        joined_KW = joined_KW[rows_K1, columns_KW]
        framed = replace(framed, documents=_surround(joined_KW, joined_KW, lengths_K, meeting_K))
    return replace(framed, next_sentence=swapped_K)


def frame_text(tokens_KW: Tokens, samples: Tokens, special: SpecialTokens, documents_KW: Tokens | None = None) -> Examples:
    """Make RoBERTa's full sentences (Liu et al. 2019, section 4.2): [CLS] text [SEP], T = W + 2.

    With documents [K, W], [CLS] belongs to the first, and [SEP], which follows the last token before padding, to the last. Padding
    becomes [PAD].
    """
    count, width = tokens_KW.shape
    framed_KT = np.full((count, width + 2), special.pad, dtype=np.int64)
    framed_KT[:, 0] = special.cls
    if documents_KW is None:
        framed_KT[:, 1:-1], framed_KT[:, -1] = tokens_KW, special.sep
        return _unmasked(framed_KT, samples)
    real_KW, rows = documents_KW != PADDING, np.arange(count)
    np.copyto(framed_KT[:, 1:-1], tokens_KW, where=real_KW)
    documents_KT = np.full_like(framed_KT, PADDING)
    documents_KT[:, 0], documents_KT[:, 1:-1] = documents_KW[:, 0], documents_KW
    ends_K = real_KW.sum(axis=1) + 1
    framed_KT[rows, ends_K], documents_KT[rows, ends_K] = special.sep, documents_KT[rows, ends_K - 1]
    return replace(_unmasked(framed_KT, samples), documents=documents_KT)


def mask_tokens(framed: Examples, keys: Hashes, *, share: float, special: SpecialTokens, whole_words: bool = False) -> Examples:
    """Choose tokens to predict: mask 80 % of them, replace 10 % by random tokens, keep 10 % (Devlin et al. 2019, section 3.1).

    Special tokens and padding are never chosen. Of the others, the number closest to `share` is chosen, and at least one. For whole words:
    the largest number that `_choose_words` finds below that.
    """
    tokens_KT = framed.tokens
    choose = _choose_words if whole_words else _choose_tokens
    rows, columns = np.nonzero(choose(framed, keys, share, special))
    masked_KT, targets_KT = tokens_KT.copy(), np.full_like(tokens_KT, IGNORED)
    targets_KT[rows, columns] = tokens_KT[rows, columns]
    actions = integers_below(fold(fold(keys, _ACTION)[rows], columns), 10)
    masked_KT[rows[actions < 8], columns[actions < 8]] = special.mask
    rows, columns = rows[actions == 8], columns[actions == 8]
    text = np.flatnonzero(special.is_text)
    masked_KT[rows, columns] = text[integers_below(fold(fold(keys, _REPLACEMENT)[rows], columns), len(text))]
    return replace(framed, tokens=masked_KT, targets=targets_KT)


def _unmasked(tokens_KT: Tokens, samples: Tokens) -> Examples:
    """Examples that predict nothing yet."""
    nothing_KT = np.broadcast_to(np.int64(IGNORED), tokens_KT.shape)
    positions_KT = np.tile(np.arange(tokens_KT.shape[1]), (len(tokens_KT), 1))
    return Examples(tokens=tokens_KT, targets=nothing_KT, positions=positions_KT, samples=samples)


def _first_lengths(keys: Hashes, width: int) -> NDArray[np.int64]:
    """Return the length of part A of each pair [K]."""
    least = max(1, width // 4)
    return least + integers_below(fold(keys, _SPLIT), width - 2 * least + 1)


def _frame_pair(first_KW: Tokens, second_KW: Tokens, lengths_K: Tokens, samples: Tokens, special: SpecialTokens) -> Examples:
    """[CLS] the first `lengths_K` tokens of the first window [SEP] the rest of the second [SEP]."""
    tokens_KT = _surround(first_KW, second_KW, lengths_K, special.sep)
    tokens_KT[:, 0] = special.cls
    segments_KT = (np.arange(tokens_KT.shape[1]) > lengths_K[:, None] + 1).astype(np.int64)
    return replace(_unmasked(tokens_KT, samples), segments=segments_KT)


def _surround(first_KW: Tokens, second_KW: Tokens, lengths_K: NDArray[np.int64], frame: int | Tokens) -> Tokens:
    """Put `frame`, one value or one per row [K], before, between and after the parts of a pair: [K, T]."""
    count, width = first_KW.shape
    framed_KT = np.empty((count, width + FRAME["next_sentence"]), dtype=np.int64)
    framed_KT[:] = np.reshape(frame, (-1, 1))
    framed_KT[:, 1:-2] = first_KW
    np.copyto(framed_KT[:, 2:-1], second_KW, where=np.arange(width) >= lengths_K[:, None])
    framed_KT[np.arange(count), lengths_K + 1] = frame
    return framed_KT


def _join_documents(first_KW: Tokens, second_KW: Tokens, cuts_K: NDArray[np.int64]) -> tuple[Tokens, Tokens]:
    """Return the first's documents up to the cut and the second's after it, [K, W], and the document that meets at the cut, [K].

    The second's documents are renumbered so that the two that meet are one.
    """
    rows = np.arange(len(cuts_K))
    meeting_K = first_KW[rows, cuts_K - 1]
    second_KW = second_KW + (meeting_K - second_KW[rows, cuts_K])[:, None]
    return np.where(np.arange(first_KW.shape[1]) < cuts_K[:, None], first_KW, second_KW), meeting_K


def _targets_per_row(text_KT: NDArray[np.bool_], share: float) -> NDArray[np.int64]:
    """Return how many text tokens of each row are to be predicted [K]."""
    return np.maximum(np.rint(share * text_KT.sum(axis=1)), 1).astype(np.int64)


def _choose_tokens(framed: Examples, keys: Hashes, share: float, special: SpecialTokens) -> NDArray[np.bool_]:
    """Choose the tokens with the lowest hashes in each row [K, T]."""
    text_KT = special.is_text[framed.tokens]
    count_K = _targets_per_row(text_KT, share)
    hashes_KT = fold(fold(keys, _CHOSEN)[:, None], np.arange(text_KT.shape[1]))
    hashes_KT[~text_KT] = np.iinfo(np.uint64).max
    highest_K = np.sort(hashes_KT, axis=1)[np.arange(len(keys)), count_K - 1]
    return text_KT & (hashes_KT <= highest_K[:, None])


def _choose_words(framed: Examples, keys: Hashes, share: float, special: SpecialTokens) -> NDArray[np.bool_]:
    """Choose the words with the lowest hashes in each row, until the next one would exceed the row's target count: [K, T].

    A word ends at the start of the next one, at a special token, or at the end of its document. Words longer than the target count are
    excluded. If a row has no others, the first tokens of one of them are chosen, up to the target count.
    """
    assert special.begins_word is not None, "every tokenizer says where words begin"
    text_KT = special.is_text[framed.tokens]
    starts_KT = special.begins_word[framed.tokens]
    starts_KT[:, 1:] |= ~text_KT[:, :-1]
    if framed.documents is not None:
        starts_KT[:, 1:] |= framed.documents[:, 1:] != framed.documents[:, :-1]
    starts_KT &= text_KT
    rows_U, columns_U = np.nonzero(starts_KT)
    word_N = np.cumsum(starts_KT[text_KT]) - 1  # the word of each text token
    lengths_U = np.bincount(word_N, minlength=len(rows_U))
    count_U = _targets_per_row(text_KT, share)[rows_U]
    fits_U = lengths_U <= count_U
    some_fit_K = np.bincount(rows_U[fits_U], minlength=len(starts_KT)) > 0
    used_U = np.minimum(lengths_U, count_U)
    hashes_U = fold(fold(keys, _CHOSEN)[rows_U], columns_U)
    order = np.lexsort((hashes_U, rows_U))
    order = order[(fits_U | ~some_fit_K[rows_U])[order]]
    sums = np.cumsum(used_U[order])
    before = sums - used_U[order]
    sums -= before[np.searchsorted(rows_U[order], rows_U[order])]  # per row
    chosen_U = np.zeros(len(rows_U), dtype=np.bool_)
    chosen_U[order] = sums <= count_U[order]
    index_N = np.arange(len(word_N)) - (np.cumsum(lengths_U) - lengths_U)[word_N]  # of each token in its word
    chosen_KT = np.zeros_like(text_KT)
    chosen_KT[text_KT] = chosen_U[word_N] & (index_N < used_U[word_N])
    return chosen_KT
