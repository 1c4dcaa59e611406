"""Contamination: spans of validation text that training text contains. Removing them is decontamination.

Spans are compared by rolling hashes. A span of 50 tokens contains one of the blocks of 24 tokens that start at every 27th token of
validation text, so training text is first searched for these few blocks, and then for spans around each match.
Legend: N tokens, H hashes.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from manta.data.cores import cores
from manta.data.hashing import Hashes, hashed, mix
from manta.data.prepare.dedup import Advance, Numbers, Streams, is_among
from manta.data.shards.windows import TokenStream

SPAN = 50  # tokens
_BLOCK = 24
_EVERY = SPAN - _BLOCK + 1
_CHUNK = 1 << 16  # tokens hashed at a time: their hashes fit into a core's cache
_MAX_VALIDATION = 1 << 21  # tokens that are searched for
_RUN = 1 << 14  # tokens: longer validation text is sampled in runs of this length, spread over it
_THREADS = 8


class Contamination(NamedTuple):
    """Validation tokens in spans of at least SPAN tokens that training text contains. Tuples have an entry per source."""

    searched_for: tuple[int, ...]
    """Validation tokens that were searched for."""
    found: tuple[int, ...]
    searched: int
    """Train tokens; if these are not all, the others may contain more."""


class _ValidationRun(NamedTuple):
    tokens: int
    blocks: Hashes
    spans: Hashes  # at each token

    @classmethod
    def hash(cls, tokens_N: NDArray[np.integer]) -> Self:
        values = _values(tokens_N)
        rolling = _block_hashes(values)
        spans = _span_hashes(values, rolling, np.arange(len(tokens_N) - SPAN + 1))
        return cls(tokens=len(tokens_N), blocks=rolling[::_EVERY], spans=spans)


def find_contamination(train: Streams, validation: Streams, *, max_tokens: int, advance: Advance) -> Contamination:
    """Search training text, `max_tokens` of it at most, for spans of validation text."""
    one_in = -(-sum(stream.tokens for stream in validation) // _MAX_VALIDATION)
    runs = [[_ValidationRun.hash(run) for run in _chunks(stream, _RUN, one_in)] for stream in validation]
    blocks = _distinct([run.blocks for source in runs for run in source])
    spans = _distinct([run.spans for source in runs for run in source])
    found = np.zeros(len(spans), dtype=np.bool_)
    bits = max(16, int(np.ceil(np.log2(32 * max(len(blocks), 1)))))
    prefilter = np.zeros(1 << bits, dtype=np.bool_)
    prefilter[blocks >> np.uint64(64 - bits)] = True
    one_in = -(-sum(stream.tokens for stream in train) // max(max_tokens, 1))
    chunks = (chunk for stream in train for chunk in _chunks(stream, _CHUNK, one_in, lookahead=SPAN - 1))
    searched = 0

    def search(chunk: NDArray[np.integer]) -> int:
        if len(spans):
            _search(_values(chunk), blocks, spans, found, prefilter)
        return min(len(chunk), _CHUNK)

    with ThreadPoolExecutor(min(_THREADS, cores())) as threads:
        for count in threads.map(search, chunks):
            searched += count
            advance(count)
    common = spans[found]
    return Contamination(
        searched_for=tuple(sum(run.tokens for run in source) for source in runs),
        found=tuple(sum(_covered(is_among(run.spans, common)) for run in source) for source in runs),
        searched=searched,
    )


def _chunks(stream: TokenStream, size: int, one_in: int, lookahead: int = 0) -> Iterator[NDArray[np.integer]]:
    """Yield one in `one_in` chunks of `size` tokens, and `lookahead` tokens after each; chunks end with their shard."""
    number = 0
    for index, shard in enumerate(stream.shards):
        for start in range(0, shard.tokens, size):
            if number % one_in == 0:
                yield stream.map(index)[start : start + size + lookahead]
            number += 1


def _distinct(parts: Sequence[Hashes]) -> Hashes:
    """Return the distinct hashes, sorted. np.unique hashes them first, and takes five times as long."""
    hashes = np.sort(np.concatenate([np.zeros(0, np.uint64), *parts]))
    return hashes[np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]]


def _values(tokens_N: NDArray[np.integer]) -> Hashes:
    """Return a pseudorandom number for each token."""
    return mix(tokens_N.astype(np.uint64) + np.uint64(1))


def _append(left: Hashes, right: Hashes, length: int) -> Hashes:
    """Return the hashes of `left` followed by `right`, which is of `length` tokens."""
    return left * _factor(length) + right


@cache
def _factor(length: int) -> np.uint64:
    return hashed(0, length)[0] | np.uint64(1)  # any odd number


def _block_hashes(values_N: Hashes) -> Hashes:
    """Return the hash of the _BLOCK tokens at each token."""
    by_length = {1: values_N}
    for length in (1, 2, 4, 8):
        half = by_length[length]
        by_length[2 * length] = _append(half[:-length], half[length:], length)
    left, right = by_length[16], by_length[8][16:]
    return _append(left[: len(right)], right, 8)


def _span_hashes(values_N: Hashes, blocks_N: Hashes, starts: Numbers) -> Hashes:
    """Return the hash of the SPAN tokens at each of these starts: two blocks and two tokens."""
    spans = _append(blocks_N[starts], blocks_N[starts + _BLOCK], _BLOCK)
    for offset in range(2 * _BLOCK, SPAN):
        spans = _append(spans, values_N[starts + offset], 1)
    return spans


def _search(values_N: Hashes, blocks_H: Hashes, spans_H: Hashes, found_H: NDArray[np.bool_], prefilter: NDArray[np.bool_]) -> None:
    """Mark the spans that this chunk of training text contains. prefilter: by the leading bits of a block's hash."""
    starts = len(values_N) - SPAN + 1
    if starts <= 0:
        return
    rolling_N = _block_hashes(values_N)
    matches = np.flatnonzero(prefilter[rolling_N >> np.uint64(64 - len(prefilter).bit_length() + 1)])
    matches = matches[is_among(rolling_N[matches], blocks_H)]
    if not len(matches):
        return
    opened = np.bincount(np.maximum(matches - _EVERY + 1, 0), minlength=starts + 1)
    closed = np.bincount(np.minimum(matches + 1, starts), minlength=starts + 1)
    around = np.flatnonzero(np.cumsum(opened - closed)[:starts] > 0)
    spans = _span_hashes(values_N, rolling_N, around)
    indexes = np.minimum(np.searchsorted(spans_H, spans), len(spans_H) - 1)
    found_H[indexes[spans_H[indexes] == spans]] = True


def _covered(starts_N: NDArray[np.bool_]) -> int:
    """Count the tokens in spans that start at these tokens."""
    changes = np.zeros(len(starts_N) + SPAN, dtype=np.int64)
    changes[: len(starts_N)] += starts_N
    changes[SPAN:] -= starts_N
    return int((np.cumsum(changes) > 0).sum())
