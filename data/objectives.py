"""Samples become examples: what a model is shown and what it has to predict, each a function of (text, seed, sample number) alone.

Legend: K examples, T sequence length, W tokens of text that an example reads, V ids of the tokenizer.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manta.data.hashing import Hashes, fold, hashed
from manta.data.tokenizer import SpecialTokens

IGNORED = -100  # the target where nothing is to be predicted
FRAME = 3  # tokens around a pair's text: [CLS] A [SEP] B [SEP]

# Training and validation, and each kind of draw, have hashes of their own.
_TRAIN, _VALIDATION = 0, 1
_SPLIT, _NEXT, _OTHER, _CHOSEN, _FATE, _REPLACEMENT = range(6)

Tokens = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    tokens: Tokens  # [K, T]
    targets: Tokens  # [K, T], IGNORED where nothing is to be predicted
    positions: Tokens  # [K, T]
    samples: Tokens  # [K], global sample numbers
    documents: Tokens | None = None  # [K, T]: a token sees its own document; None: all of them
    segments: Tokens | None = None  # [K, T]: 0 for [CLS] A [SEP], 1 for B [SEP]
    next_sentence: Tokens | None = None  # [K]: 0 where B follows A, 1 where it does not


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """What decides K masked examples before their text is read."""

    keys: Hashes  # [K]: all further draws of an example are hashes of its key
    following: NDArray[np.int64]  # [K]: the window that B is cut from
    next_sentence: Tokens  # [K]


def causal(windows_KW: Tokens, samples: Tokens, *, end_of_text: int | None = None) -> Examples:
    """Windows [K, T + 1] -> each token with the one after it for target. Where the end-of-text id is given, documents are kept apart.

    That id belongs to the document that it ends. It predicts nothing then: the token after it is of a document not yet seen.
    """
    tokens_KT, targets_KT = windows_KW[:, :-1], windows_KW[:, 1:]
    positions_KT = np.empty(tokens_KT.shape, dtype=np.int64)
    positions_KT[:] = np.arange(tokens_KT.shape[1])
    if end_of_text is None:
        return Examples(tokens=tokens_KT, targets=targets_KT, positions=positions_KT, samples=samples)
    ends_KT = tokens_KT == end_of_text
    begins_KT = np.zeros_like(ends_KT)
    begins_KT[:, 1:] = ends_KT[:, :-1]
    return Examples(
        tokens=tokens_KT,
        targets=np.where(ends_KT, IGNORED, targets_KT),
        positions=positions_KT - np.maximum.accumulate(np.where(begins_KT, positions_KT, 0), axis=1),
        samples=samples,
        documents=begins_KT.cumsum(axis=1, dtype=np.int64),
    )


def pairs(samples: Tokens, windows: NDArray[np.int64], *, count: int, seed: int | None) -> Pairs:
    """Where B of each sample comes from, A being of its window [K] in range(count): by even odds from the same one, or any other.

    Without a seed these are validation's, the same for every run. Of a single window, B always follows A.
    """
    keys = hashed(0, _VALIDATION, samples) if seed is None else hashed(seed, _TRAIN, samples)
    if count == 1:
        return Pairs(keys=keys, following=windows, next_sentence=np.zeros(len(samples), dtype=np.int64))
    next_sentence = _draw(fold(keys, _NEXT), 2)
    others = (windows + 1 + _draw(fold(keys, _OTHER), count - 1)) % count
    return Pairs(keys=keys, following=np.where(next_sentence == 1, others, windows), next_sentence=next_sentence)


def masked(first_KW: Tokens, second_KW: Tokens, drawn: Pairs, samples: Tokens, *, share: float, special: SpecialTokens) -> Examples:
    """BERT's examples (Devlin et al. 2019, sections 3.1 and A.2): [CLS] A [SEP] B [SEP], T = W + 3, some of their tokens to be predicted.

    A is the beginning of the first window, B of the second what stands after a part as long as A. Neither is under a quarter of the text.
    Special tokens are never predicted; else at least one token is, and as near to `share` of them as whole numbers allow.
    """
    count, width = first_KW.shape
    column = np.arange(width + FRAME)
    least = max(1, width // 4)
    ends_K = least + _draw(fold(drawn.keys, _SPLIT), width - 2 * least + 1) + 1  # where the [SEP] after A stands
    segments_KT = (column > ends_K[:, None]).astype(np.int64)
    text_KT = np.full((count, width + FRAME), special.sep, dtype=np.int64)
    text_KT[:, 1:-2] = first_KW
    np.copyto(text_KT[:, 2:-1], second_KW, where=segments_KT[:, 2:-1] == 1)
    text_KT[:, 0] = special.cls
    text_KT[np.arange(count), ends_K] = special.sep
    rows, columns = np.nonzero(_chosen(text_KT, drawn.keys, share, special))
    tokens_KT, targets_KT = text_KT.copy(), np.full_like(text_KT, IGNORED)
    targets_KT[rows, columns] = text_KT[rows, columns]
    fates = _draw(fold(fold(drawn.keys, _FATE)[rows], columns), 10)
    tokens_KT[rows[fates < 8], columns[fates < 8]] = special.mask
    rows, columns = rows[fates == 8], columns[fates == 8]
    text = np.flatnonzero(special.is_text)
    tokens_KT[rows, columns] = text[_draw(fold(fold(drawn.keys, _REPLACEMENT)[rows], columns), len(text))]
    return Examples(
        tokens=tokens_KT,
        targets=targets_KT,
        positions=np.tile(column, (count, 1)),
        samples=samples,
        segments=segments_KT,
        next_sentence=drawn.next_sentence,
    )


def _chosen(text_KT: Tokens, keys: Hashes, share: float, special: SpecialTokens) -> NDArray[np.bool_]:
    """The tokens to be predicted: of each row's ordinary ones those with the lowest hashes."""
    ordinary_KT = special.is_text[text_KT]
    wanted_K = np.maximum(np.rint(share * ordinary_KT.sum(axis=1)), 1).astype(np.int64)
    hashes_KT = fold(fold(keys, _CHOSEN)[:, None], np.arange(text_KT.shape[1]))
    hashes_KT[~ordinary_KT] = np.iinfo(np.uint64).max
    highest_K = np.sort(hashes_KT, axis=1)[np.arange(len(keys)), wanted_K - 1]
    return ordinary_KT & (hashes_KT <= highest_K[:, None])


def _draw(hashes: Hashes, below: int) -> NDArray[np.int64]:
    """A number in range(below) of each hash; the remainder's bias is below / 2**64."""
    return (hashes % np.uint64(below)).astype(np.int64)
