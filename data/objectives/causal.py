"""Examples that predict the next token, and fill-in-the-middle.

Legend: K examples, T sequence length, W tokens of text that an example is made of, S documents in all windows, N tokens in all.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from manta.data.hashing import Hashes, fold
from manta.data.objectives.examples import IGNORED, PADDING, Examples, Tokens, bernoulli, document_starts, integers_below
from manta.data.tokenizer.tokenizer import FimTokens

_FILLED, _CUT, _OTHER_CUT, _SUFFIX_FIRST = range(16, 20)  # hash domains; those of `masked` count from 0
_LEAST_FILLED = 3  # tokens that a document needs for a prefix, a middle and a suffix


def causal_examples(tokens_KW: Tokens, samples: Tokens, documents_KW: Tokens | None = None) -> Examples:
    """Make windows [K, T + 1] into examples whose target at each token is the next token.

    documents_KW: if given, documents are separated. Positions restart in each, and neither the last token of a document nor padding
    predicts anything.
    """
    tokens_KT, targets_KT = tokens_KW[:, :-1], tokens_KW[:, 1:]
    positions_KT = np.empty(tokens_KT.shape, dtype=np.int64)
    positions_KT[:] = np.arange(tokens_KT.shape[1])
    if documents_KW is None:
        return Examples(tokens=tokens_KT, targets=targets_KT, positions=positions_KT, samples=samples)
    documents_KT = np.ascontiguousarray(documents_KW[:, :-1])
    continues_KT = (documents_KT == documents_KW[:, 1:]) & (documents_KT != PADDING)
    return Examples(
        tokens=tokens_KT,
        targets=np.where(continues_KT, targets_KT, IGNORED),
        positions=positions_KT - np.maximum.accumulate(np.where(document_starts(documents_KT), positions_KT, 0), axis=1),
        samples=samples,
        documents=documents_KT,
    )


def split_windows(tokens_KW: Tokens, sequence_length: int) -> Tokens:
    """Cut windows [K, T + 1] into windows [K * T / s, s + 1] of s targets. Neighbours share one token, as whole windows do."""
    starts = np.arange(0, tokens_KW.shape[1] - 1, sequence_length)
    return tokens_KW[:, starts[:, None] + np.arange(sequence_length + 1)].reshape(-1, sequence_length + 1)


def fill_in_the_middle(
    tokens_KW: Tokens, documents_KW: Tokens, keys: Hashes, *, rate: float, suffix_first: float, marks: FimTokens, end_of_text: int
) -> tuple[Tokens, Tokens]:
    """Move the middle of some documents to their end (Bavarian et al. 2022, section 3). Return tokens [K, W] and documents [K, W].

    A document, or the part of it in a window, is transformed with probability `rate`. Two uniform cuts divide it into prefix, middle and
    suffix, any of which may be empty. It becomes <pre> prefix <suf> suffix <mid> middle or, with probability `suffix_first`,
    <pre> <suf> suffix <mid> prefix middle (the paper's variant 2). Its end-of-text token stays last. Tokens that the marks push beyond
    the end of the window are lost, padding first. A document of fewer than three tokens is not transformed.
    """
    K, W = tokens_KW.shape
    if rate == 0 or K == 0:
        return tokens_KW, documents_KW
    text_N = tokens_KW.ravel()
    # A segment is the part of a document in a window, or the padding of a window.
    start_S = np.flatnonzero(document_starts(documents_KW))
    row_S, document_S, length_S = start_S // W, documents_KW.ravel()[start_S], np.diff(start_S, append=K * W)
    content_S = length_S - (text_N[start_S + length_S - 1] == end_of_text)
    keys_S = fold(keys[row_S], document_S)
    filled_S = (document_S != PADDING) & (content_S >= _LEAST_FILLED) & bernoulli(fold(keys_S, _FILLED), rate)
    cuts_2S = np.sort([integers_below(fold(keys_S, kind), content_S + 1) for kind in (_CUT, _OTHER_CUT)], axis=0)
    a_S, b_S = np.where(filled_S, cuts_2S, 0)  # without cuts, everything is suffix

    # Pieces are (start, length) in the text, to whose end the three marks are appended.
    mark_S = filled_S.astype(np.int64)
    pre, suf, mid = ((np.full_like(start_S, K * W + index), mark_S) for index in range(3))
    prefix, middle, suffix = (start_S, a_S), (start_S + a_S, b_S - a_S), (start_S + b_S, content_S - b_S)
    end = (start_S + content_S, length_S - content_S)
    pieces_7_2S = np.where(
        bernoulli(fold(keys_S, _SUFFIX_FIRST), suffix_first),
        np.array([pre, suf, suffix, mid, prefix, middle, end]),
        np.array([pre, prefix, suf, suffix, mid, middle, end]),
    )
    starts, lengths = (pieces.ravel() for pieces in pieces_7_2S.transpose(1, 2, 0))  # [S * 7], in output order
    moved_N = np.append(text_N, [marks.prefix, marks.suffix, marks.middle]).take(_ranges(starts, lengths))
    documents_N = np.repeat(document_S, length_S + 3 * filled_S)
    row_starts_K = (np.cumsum(lengths) - lengths)[7 * np.searchsorted(row_S, np.arange(K))]
    moved_KW, documents_KW = (sliding_window_view(flat_N, W)[row_starts_K] for flat_N in (moved_N, documents_N))
    return moved_KW, documents_KW


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return range(start, start + length) of each piece, one after another."""
    ranges = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    ranges += np.arange(len(ranges))
    return ranges
