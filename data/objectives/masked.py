"""Examples of masked language models: text between special tokens, of which some tokens are hidden and have to be predicted.

`next_sentence`, `sentence_order` and `alone` frame text; `masked` hides some of it. Both are functions of (text, seed, sample number):
as the number counts on from epoch to epoch, a text is hidden in other places each time it is read (RoBERTa's dynamic masking).
Legend: K examples, T sequence length, W tokens of text that an example reads, V ids of the tokenizer, N tokens of text in all, U words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from manta.data.hashing import Hashes, fold
from manta.data.objectives.causal import IGNORED, PADDING, Examples, Tokens, draw, keyed
from manta.data.tokenizer.tokenizer import SpecialTokens

FRAME = {"next_sentence": 3, "sentence_order": 3, "none": 2}
"""Tokens around an example's text, by data.pairs: T - W."""

_SPLIT, _NEXT, _OTHER, _CHOSEN, _FATE, _REPLACEMENT, _SWAPPED = range(7)  # kinds of draws; `objectives` has others


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """What decides K pairs before their text is read."""

    keys: Hashes  # [K]: all further draws of an example are hashes of its key
    following: NDArray[np.int64]  # [K]: the window that B is cut from
    next_sentence: Tokens  # [K]

    @classmethod
    def joined(cls, parts: "Sequence[Self]", order: NDArray[np.intp]) -> "Self":
        """The pairs of all parts, picked by `order`."""
        keys, following, apart = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("keys", "following", "next_sentence")
        )
        return cls(keys=keys[order], following=following[order], next_sentence=apart[order])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Framed:
    """Text among special tokens, of which nothing is hidden yet; each field as in Examples."""

    keys: Hashes  # [K]
    tokens: Tokens  # [K, T]
    documents: Tokens | None = None
    segments: Tokens | None = None
    next_sentence: Tokens | None = None


def pairs(samples: Tokens, windows: NDArray[np.int64], *, count: ArrayLike, seed: int | None) -> Pairs:
    """Where B of each sample comes from, A being of its window [K] in range(count): by even odds from the same one, or any other.

    Without a seed these are validation's, the same for every run. Of a single window, B always follows A.
    """
    keys, count = keyed(samples, seed), np.asarray(count, dtype=np.int64)
    apart = np.where(count == 1, 0, draw(fold(keys, _NEXT), 2))
    others = (windows + 1 + draw(fold(keys, _OTHER), np.maximum(count - 1, 1))) % count
    return Pairs(keys=keys, following=np.where(apart == 1, others, windows), next_sentence=apart)


def next_sentence(
    first_KW: Tokens, second_KW: Tokens, drawn: Pairs, special: SpecialTokens, documents: tuple[Tokens, Tokens] | None = None
) -> Framed:
    """BERT's pairs (Devlin et al. 2019, sections 3.1 and A.2): [CLS] A [SEP] B [SEP], T = W + 3.

    A is the beginning of the first window, B of the second what stands after a part as long as A. Neither is under a quarter of the text.
    With documents [K, W] of both, A's last and B's first, between which the question is, are one, together with [CLS] and both [SEP].
    """
    lengths_K = _lengths(drawn.keys, first_KW.shape[1])
    framed = _framed(first_KW, second_KW, lengths_K, drawn.keys, special)
    if documents is not None:
        joined_KW, meeting_K = _joined(*documents, lengths_K)
        framed = replace(framed, documents=_around(joined_KW, joined_KW, lengths_K, meeting_K))
    return replace(framed, next_sentence=drawn.next_sentence)


def sentence_order(text_KW: Tokens, keys: Hashes, special: SpecialTokens, documents_KW: Tokens | None = None) -> Framed:
    """ALBERT's pairs (Lan et al. 2020, section 3.1): a window cut in two, [CLS] A [SEP] B [SEP], T = W + 3; by even odds A follows B.

    Then next_sentence is 1. Neither part is under a quarter of the text. With documents [K, W], those on either side of the cut are one,
    together with [CLS] and both [SEP]: what is asked is how these two stood, wherever they stand now.
    """
    rows_K1, width = np.arange(len(text_KW))[:, None], text_KW.shape[1]
    lengths_K, swapped_K = _lengths(keys, width), draw(fold(keys, _SWAPPED), 2)
    cuts_K = np.where(swapped_K == 1, width - lengths_K, lengths_K)
    turned_KW = (np.arange(width) + (swapped_K * cuts_K)[:, None]) % width
    text_KW = text_KW[rows_K1, turned_KW]
    framed = _framed(text_KW, text_KW, lengths_K, keys, special)
    if documents_KW is not None:
        joined_KW, meeting_K = _joined(documents_KW, documents_KW, cuts_K)
        joined_KW = joined_KW[rows_K1, turned_KW]
        framed = replace(framed, documents=_around(joined_KW, joined_KW, lengths_K, meeting_K))
    return replace(framed, next_sentence=swapped_K)


def alone(text_KW: Tokens, keys: Hashes, special: SpecialTokens, documents_KW: Tokens | None = None) -> Framed:
    """RoBERTa's (Liu et al. 2019, section 4.2, full sentences): [CLS] text [SEP], T = W + 2.

    With documents [K, W], [CLS] is of the first and [SEP], which follows the last token that is no padding, of the last. Padding is [PAD].
    """
    count, width = text_KW.shape
    tokens_KT = np.full((count, width + 2), special.pad, dtype=np.int64)
    tokens_KT[:, 0] = special.cls
    if documents_KW is None:
        tokens_KT[:, 1:-1], tokens_KT[:, -1] = text_KW, special.sep
        return Framed(keys=keys, tokens=tokens_KT)
    real_KW, rows = documents_KW != PADDING, np.arange(count)
    np.copyto(tokens_KT[:, 1:-1], text_KW, where=real_KW)
    documents_KT = np.full_like(tokens_KT, PADDING)
    documents_KT[:, 0], documents_KT[:, 1:-1] = documents_KW[:, 0], documents_KW
    ends_K = real_KW.sum(axis=1) + 1
    tokens_KT[rows, ends_K], documents_KT[rows, ends_K] = special.sep, documents_KT[rows, ends_K - 1]
    return Framed(keys=keys, tokens=tokens_KT, documents=documents_KT)


def masked(framed: Framed, samples: Tokens, *, share: float, special: SpecialTokens, whole_words: bool = False) -> Examples:
    """Hides some tokens of the text, and leaves others to be predicted all the same (Devlin et al. 2019, section 3.1).

    Special tokens and padding are never predicted; else at least one token is, and as near to `share` of them as whole numbers allow.
    Whole words: as near as they allow from below; `_chosen_words` says how.
    """
    keys, text_KT = framed.keys, framed.tokens
    chosen_KT = _chosen_words(framed, share, special) if whole_words else _chosen(text_KT, keys, share, special)
    rows, columns = np.nonzero(chosen_KT)
    tokens_KT, targets_KT = text_KT.copy(), np.full_like(text_KT, IGNORED)
    targets_KT[rows, columns] = text_KT[rows, columns]
    fates = draw(fold(fold(keys, _FATE)[rows], columns), 10)
    tokens_KT[rows[fates < 8], columns[fates < 8]] = special.mask
    rows, columns = rows[fates == 8], columns[fates == 8]
    text = np.flatnonzero(special.is_text)
    tokens_KT[rows, columns] = text[draw(fold(fold(keys, _REPLACEMENT)[rows], columns), len(text))]
    return Examples(
        tokens=tokens_KT,
        targets=targets_KT,
        positions=np.tile(np.arange(text_KT.shape[1]), (len(text_KT), 1)),
        samples=samples,
        documents=framed.documents,
        segments=framed.segments,
        next_sentence=framed.next_sentence,
    )


def _lengths(keys: Hashes, width: int) -> NDArray[np.int64]:
    """Of A: [K]."""
    least = max(1, width // 4)
    return least + draw(fold(keys, _SPLIT), width - 2 * least + 1)


def _framed(first_KW: Tokens, second_KW: Tokens, lengths_K: NDArray[np.int64], keys: Hashes, special: SpecialTokens) -> Framed:
    """[CLS] so many tokens of the first [SEP] the second's others [SEP]."""
    tokens_KT = _around(first_KW, second_KW, lengths_K, special.sep)
    tokens_KT[:, 0] = special.cls
    segments_KT = (np.arange(tokens_KT.shape[1]) > lengths_K[:, None] + 1).astype(np.int64)
    return Framed(keys=keys, tokens=tokens_KT, segments=segments_KT)


def _around(first_KW: Tokens, second_KW: Tokens, lengths_K: NDArray[np.int64], frame: int | Tokens) -> Tokens:
    """Before, between and after the parts of a pair its frame, one or [K]: [K, T]."""
    count, width = first_KW.shape
    framed_KT = np.empty((count, width + FRAME["next_sentence"]), dtype=np.int64)
    framed_KT[:] = np.reshape(frame, (-1, 1))
    framed_KT[:, 1:-2] = first_KW
    np.copyto(framed_KT[:, 2:-1], second_KW, where=np.arange(width) >= lengths_K[:, None])
    framed_KT[np.arange(count), lengths_K + 1] = frame
    return framed_KT


def _joined(first_KW: Tokens, second_KW: Tokens, cuts_K: NDArray[np.int64]) -> tuple[Tokens, Tokens]:
    """The first's documents up to the cut, from there the second's, numbered so that those that meet there are one; and its number [K]."""
    rows = np.arange(len(cuts_K))
    meeting_K = first_KW[rows, cuts_K - 1]
    second_KW = second_KW + (meeting_K - second_KW[rows, cuts_K])[:, None]
    return np.where(np.arange(first_KW.shape[1]) < cuts_K[:, None], first_KW, second_KW), meeting_K


def _wanted(ordinary_KT: NDArray[np.bool_], share: float) -> NDArray[np.int64]:
    """How many of each row's ordinary tokens are to be predicted: [K]."""
    return np.maximum(np.rint(share * ordinary_KT.sum(axis=1)), 1).astype(np.int64)


def _chosen(text_KT: Tokens, keys: Hashes, share: float, special: SpecialTokens) -> NDArray[np.bool_]:
    """The tokens to be predicted: of each row's ordinary ones those with the lowest hashes."""
    ordinary_KT = special.is_text[text_KT]
    wanted_K = _wanted(ordinary_KT, share)
    hashes_KT = fold(fold(keys, _CHOSEN)[:, None], np.arange(text_KT.shape[1]))
    hashes_KT[~ordinary_KT] = np.iinfo(np.uint64).max
    highest_K = np.sort(hashes_KT, axis=1)[np.arange(len(keys)), wanted_K - 1]
    return ordinary_KT & (hashes_KT <= highest_K[:, None])


def _chosen_words(framed: Framed, share: float, special: SpecialTokens) -> NDArray[np.bool_]:
    """The tokens of the words to be predicted: of each row's words those with the lowest hashes, until the next would be too much.

    A word reaches to the next that begins, and never over a special token or into another document. Words of more tokens than are wanted
    are passed over; where a row has no others, of one of them as many tokens as are wanted are predicted, from its first on.
    """
    assert special.begins_word is not None, "every tokenizer says where words begin"
    ordinary_KT = special.is_text[framed.tokens]
    begins_KT = special.begins_word[framed.tokens]
    begins_KT[:, 1:] |= ~ordinary_KT[:, :-1]
    if framed.documents is not None:
        begins_KT[:, 1:] |= framed.documents[:, 1:] != framed.documents[:, :-1]
    begins_KT &= ordinary_KT
    rows_U, columns_U = np.nonzero(begins_KT)
    words_N = np.cumsum(begins_KT[ordinary_KT]) - 1
    lengths_U = np.bincount(words_N, minlength=len(rows_U))
    wanted_U = _wanted(ordinary_KT, share)[rows_U]
    fit_U = lengths_U <= wanted_U
    some_fit_K = np.bincount(rows_U[fit_U], minlength=len(begins_KT)) > 0
    taken_U = np.minimum(lengths_U, wanted_U)
    hashes_U = fold(fold(framed.keys, _CHOSEN)[rows_U], columns_U)
    order = np.lexsort((hashes_U, rows_U))
    order = order[(fit_U | ~some_fit_K[rows_U])[order]]
    sums = np.cumsum(taken_U[order])
    before = sums - taken_U[order]
    sums -= before[np.searchsorted(rows_U[order], rows_U[order])]  # those of the row alone
    chosen_U = np.zeros(len(rows_U), dtype=np.bool_)
    chosen_U[order] = sums <= wanted_U[order]
    places_N = np.arange(len(words_N)) - (np.cumsum(lengths_U) - lengths_U)[words_N]
    chosen_KT = np.zeros_like(ordinary_KT)
    chosen_KT[ordinary_KT] = chosen_U[words_N] & (places_N < taken_U[words_N])
    return chosen_KT
