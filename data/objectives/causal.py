"""Samples become examples: what a model is shown and what it has to predict, each a function of (text, seed, sample number) alone.

Here are those that predict the next token; `masking` has those that predict hidden ones. Text comes in windows, with a number for each
token's document: they rise from 0 along a window; padding, which stands at its end, has -1.
Legend: K examples, T sequence length, W tokens of text that an example reads, S documents over all windows, D segments of a batch.
"""

from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from manta.data.hashing import Hashes, fold, hashed
from manta.data.tokenizer.tokenizer import FimTokens

IGNORED = -100  # the target where nothing is to be predicted
PADDING = -1  # the document of what stands for nothing
DIGEST_BITS = 32  # sums of so many bits over 2**20 samples are still exact in a float64

# Training and validation, and each kind of draw, have hashes of their own; masking's kinds count from 0.
_TRAIN, _VALIDATION = 0, 1
_FILLED, _CUT, _OTHER_CUT, _SUFFIX_FIRST = range(16, 20)
_LEAST_FILLED = 3  # tokens that a document has for a prefix, a middle and a suffix

Tokens = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    tokens: Tokens  # [K, T]
    targets: Tokens  # [K, T], IGNORED where nothing is to be predicted
    positions: Tokens  # [K, T]
    samples: Tokens  # [K], global sample numbers
    cut: Tokens | None = None  # [K]: which part of its sample a shorter sequence is; None: each is a whole sample
    documents: Tokens | None = None  # [K, T]: a token sees its own document; padding has -1; None: all of them
    segments: Tokens | None = None  # [K, T]: 0 for [CLS] A [SEP], 1 for B [SEP]
    next_sentence: Tokens | None = None  # [K]: 0 where B follows A, 1 where it does not, or where the two were swapped

    def digest(self) -> int:
        """Summed over rows, and so over batches and ranks, in any order: runs that read the same samples show the same, on any machines."""
        rows = zip(self.tokens, self.targets, strict=True)
        return sum(xxhash.xxh3_64_intdigest(np.stack(row).tobytes()) % 2**DIGEST_BITS for row in rows)

    def cumulative_lengths(self) -> NDArray[np.int32]:
        """Where documents begin and end in the batch laid out flat, [K * T]: int32 [D + 1], the first 0 and the last K * T.

        It is what kernels for sequences of varying length call cu_seqlens. No segment reaches over the end of a row; a row's padding is
        a segment of its own, as is a whole row where documents are not kept apart.
        Raises ValueError where a document is in several pieces, as that of a pair among others is ([CLS] and what is around the [SEP]).
        """
        K, T = self.tokens.shape
        if self.documents is None:
            return np.arange(0, K * T + 1, T, dtype=np.int32)
        begins_KT = _begins(self.documents)
        sorted_KT = np.sort(self.documents, axis=1)
        torn_K = begins_KT.sum(axis=1) > _begins(sorted_KT).sum(axis=1)
        if torn_K.any():
            raise ValueError(f"sample {self.samples[torn_K][0]} has a document in several pieces: no lengths tell them")
        return np.append(np.flatnonzero(begins_KT), K * T).astype(np.int32)


def keyed(samples: Tokens, seed: int | None, cut: Tokens | None = None) -> Hashes:
    """The keys [K] that all draws of these samples are hashes of. Without a seed they are validation's, the same for every run.

    cut: of which of their parts, where samples are cut into shorter sequences.
    """
    keys = hashed(0, _VALIDATION, samples) if seed is None else hashed(seed, _TRAIN, samples)
    return keys if cut is None else fold(keys, cut)


def shorter(windows_KW: Tokens, sequence_length: int) -> Tokens:
    """Windows [K, T + 1] -> [K * T / s, s + 1]: each cut into windows of s targets, which share one token as windows do."""
    starts = np.arange(0, windows_KW.shape[1] - 1, sequence_length)
    return windows_KW[:, starts[:, None] + np.arange(sequence_length + 1)].reshape(-1, sequence_length + 1)


def draw(hashes: Hashes, below: ArrayLike) -> NDArray[np.int64]:
    """A number in range(below) of each hash; the remainder's bias is below / 2**64."""
    return (hashes % np.asarray(below, dtype=np.uint64)).astype(np.int64)


def number_documents(text_KW: Tokens, end_of_text: int) -> Tokens:
    """Documents [K, W] of running text. An end-of-text id belongs to the document that it ends."""
    documents_KW = np.zeros_like(text_KW)
    np.cumsum(text_KW[:, :-1] == end_of_text, axis=1, out=documents_KW[:, 1:])
    return documents_KW


def as_one(documents_KW: Tokens) -> Tokens:
    """All documents of a window as one, and its padding still apart."""
    return np.minimum(documents_KW, 0)


def causal(text_KW: Tokens, samples: Tokens, documents_KW: Tokens | None = None) -> Examples:
    """Windows [K, T + 1] -> each token with the one after it for target.

    With documents, these are kept apart: positions begin anew in each, and a document's last token predicts nothing. Nor does padding.
    """
    tokens_KT, targets_KT = text_KW[:, :-1], text_KW[:, 1:]
    positions_KT = np.empty(tokens_KT.shape, dtype=np.int64)
    positions_KT[:] = np.arange(tokens_KT.shape[1])
    if documents_KW is None:
        return Examples(tokens=tokens_KT, targets=targets_KT, positions=positions_KT, samples=samples)
    documents_KT = np.ascontiguousarray(documents_KW[:, :-1])
    goes_on_KT = (documents_KT == documents_KW[:, 1:]) & (documents_KT != PADDING)
    return Examples(
        tokens=tokens_KT,
        targets=np.where(goes_on_KT, targets_KT, IGNORED),
        positions=positions_KT - np.maximum.accumulate(np.where(_begins(documents_KT), positions_KT, 0), axis=1),
        samples=samples,
        documents=documents_KT,
    )


def fill_in_the_middle(
    text_KW: Tokens,
    documents_KW: Tokens,
    keys: Hashes,
    *,
    rate: float,
    suffix_first: float,
    marks: FimTokens,
    end_of_text: int,
) -> tuple[Tokens, Tokens]:
    """Moves the middle of some documents to their end (Bavarian et al. 2022, section 3) -> text [K, W], documents [K, W].

    A document, or what a window holds of it, is chosen with probability `rate` and cut at two places, drawn evenly: any part may be empty.
    It becomes <pre> prefix <suf> suffix <mid> middle or, with probability `suffix_first`, <pre> <suf> suffix <mid> prefix middle (their
    variant 2). Its end-of-text id stays last. What the marks push over the end of the window is lost, padding before anything else. A
    document of fewer than three tokens is left as it is.
    """
    if rate == 0:
        return text_KW, documents_KW
    K, W = text_KW.shape
    # A segment is what a window holds of a document, or its padding.
    begins_S = np.flatnonzero(_begins(documents_KW))
    row_S = begins_S // W
    document_S = documents_KW.ravel()[begins_S]
    length_S = np.diff(begins_S, append=K * W)
    content_S = length_S - (text_KW.ravel()[begins_S + length_S - 1] == end_of_text)
    keys_S = fold(keys[row_S], document_S)
    filled_S = (document_S != PADDING) & (content_S >= _LEAST_FILLED) & _happens(fold(keys_S, _FILLED), rate)
    suffix_first_S = _happens(fold(keys_S, _SUFFIX_FIRST), suffix_first)
    cuts_2S = np.sort([draw(fold(keys_S, kind), content_S + 1) for kind in (_CUT, _OTHER_CUT)], axis=0)
    a_S, b_S = np.where(filled_S, cuts_2S, 0)
    # Each part moves as a whole. Rows are laid out so wide that none reaches into the next.
    added_S = 3 * filled_S
    before_S = np.cumsum(added_S) - added_S
    before_S -= before_S[np.searchsorted(row_S, row_S)]
    wide = W + int((before_S + added_S).max(initial=0))
    first_S = begins_S + row_S * (wide - W) + before_S
    suffix_S = content_S - b_S
    parts_S4 = np.stack([a_S, b_S - a_S, suffix_S, length_S - content_S], axis=1)
    shifts_S4 = np.stack(
        [
            np.where(suffix_first_S, 3 + suffix_S, 1),
            3 + suffix_S,
            np.where(suffix_first_S, 2 - b_S, 2 - b_S + a_S),
            np.full_like(a_S, 3),
        ],
        axis=1,
    )
    shifts_S4 = np.where(filled_S[:, None], shifts_S4, 0) + (first_S - begins_S)[:, None]
    to_N = np.arange(K * W) + np.repeat(shifts_S4.ravel(), parts_S4.ravel())
    text, documents = np.empty(K * wide, dtype=np.int64), np.empty(K * wide, dtype=np.int64)
    text[to_N], documents[to_N] = text_KW.ravel(), documents_KW.ravel()
    after_prefix_S = np.where(suffix_first_S, 1, 1 + a_S)
    for mark, place_S in ((marks.prefix, 0), (marks.suffix, after_prefix_S), (marks.middle, after_prefix_S + 1 + suffix_S)):
        at = (first_S + place_S)[filled_S]
        text[at], documents[at] = mark, document_S[filled_S]
    return text.reshape(K, wide)[:, :W], documents.reshape(K, wide)[:, :W]


def _begins(documents_KW: Tokens) -> NDArray[np.bool_]:
    """Where another document begins, or a window."""
    begins_KW = np.ones(documents_KW.shape, dtype=np.bool_)
    np.not_equal(documents_KW[:, 1:], documents_KW[:, :-1], out=begins_KW[:, 1:])
    return begins_KW


def _happens(hashes: Hashes, probability: float) -> NDArray[np.bool_]:
    return (hashes >> np.uint64(11)) * 2.0**-53 < probability
