"""Examples: what a model is shown and what it must predict, each a function of (text, seed, sample number) alone.

Windows come with a number for each token's document: numbers rise from 0 along a window; padding, at the end of a window, has -1.
Legend: K examples, T sequence length, W tokens of text that an example is made of.
"""

from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from manta.data.hashing import Hashes, fold, hashed

IGNORED = -100  # the target if nothing is to be predicted
PADDING = -1  # the document of padding
DIGEST_BITS = 32  # sums of 2**20 samples' digests are still exact in a float64

_TRAIN, _VALIDATION = 0, 1  # hash domains of sample keys

Tokens = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """K examples."""

    tokens: Tokens  # [K, T]
    targets: Tokens  # [K, T], IGNORED if nothing is to be predicted
    positions: Tokens  # [K, T]
    samples: Tokens  # [K]: sample numbers in the run
    sources: Tokens | None = None  # [K]: the source that each is from; None: of several at once
    part: Tokens | None = None  # [K]: which part of its sample a shorter sequence is; None: whole samples
    documents: Tokens | None = None  # [K, T]: a token attends to its own document; padding has -1; None: to the whole sequence
    segments: Tokens | None = None  # [K, T]: 0 for [CLS] A [SEP], 1 for B [SEP]
    next_sentence: Tokens | None = None  # [K]: 0 if B follows A, 1 if it does not or if the two were swapped

    def digest(self) -> int:
        """Return a sum over rows, which can be added over batches and ranks in any order: it identifies the samples that were read."""
        rows = zip(self.tokens, self.targets, strict=True)
        return sum(xxhash.xxh3_64_intdigest(np.stack(row).tobytes()) % 2**DIGEST_BITS for row in rows)


def sample_keys(samples: Tokens, seed: int | None, part: Tokens | None = None) -> Hashes:
    """Return the keys [K] from which all random draws of these samples are hashed.

    seed: the run's; None for validation, whose draws are the same in every run. part [K]: if samples are cut into shorter sequences.
    """
    keys = hashed(0, _VALIDATION, samples) if seed is None else hashed(seed, _TRAIN, samples)
    return keys if part is None else fold(keys, part)


def integers_below(hashes: Hashes, below: ArrayLike) -> NDArray[np.int64]:
    """Map hashes to integers in range(below). The modulo bias is below / 2**64."""
    return (hashes % np.asarray(below, dtype=np.uint64)).astype(np.int64)


def bernoulli(hashes: Hashes, probability: float) -> NDArray[np.bool_]:
    """Map hashes to booleans that are True with the given probability."""
    return (hashes >> np.uint64(11)) * 2.0**-53 < probability


def number_documents(tokens_KW: Tokens, end_of_text: int) -> Tokens:
    """Return the document [K, W] of each token of running text. An end-of-text token belongs to the document that it ends."""
    documents_KW = np.zeros_like(tokens_KW)
    np.cumsum(tokens_KW[:, :-1] == end_of_text, axis=1, out=documents_KW[:, 1:])
    return documents_KW


def merge_documents(documents_KW: Tokens) -> Tokens:
    """Make all documents of a window one, still without its padding."""
    return np.minimum(documents_KW, 0)


def document_starts(documents_KW: Tokens) -> NDArray[np.bool_]:
    """Return whether each token is the first of a document or of its window."""
    starts_KW = np.ones(documents_KW.shape, dtype=np.bool_)
    np.not_equal(documents_KW[:, 1:], documents_KW[:, :-1], out=starts_KW[:, 1:])
    return starts_KW
