"""What stands in a corpus more than once: whole documents, and spans of validation text that training text holds too.

Documents are compared by their hashes. Of a corpus too large to be read whole, those are read whose length is drawn: documents that are
the same are of one length, so all copies of one are read or none. Spans are compared by rolling hashes: a span of 50 tokens holds one of
the blocks of 24 that begin every 27th token, so training text is searched for these few first, and only around what is found for spans.
Legend: D documents, N tokens, H hashes.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import xxhash
from numpy.typing import NDArray

from manta.data.hashing import Hashes, hashed, mix
from manta.data.sampling.windows import TokenStream
from manta.data.shards.statistics import document_lengths

SPAN = 50  # tokens
_BLOCK = 24
_EVERY = SPAN - _BLOCK + 1
_CHUNK = 1 << 16  # tokens hashed at a time: what they take fits a core's cache
_DOCUMENTS_AT_ONCE = 1 << 22  # tokens
_MOST_DOCUMENTS = 1 << 24  # whose hashes are held: some 70 bytes each, until all are compared
_MOST_SEARCHED_FOR = 1 << 21  # tokens of validation text
_RUN = 1 << 14  # tokens: of longer validation text such runs are searched for, spread over it
_THREADS = 8
_SHOWN = 5  # of the documents that stand most often

Numbers = NDArray[np.int64]
Tell = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """A document that stands several times."""

    count: int
    tokens: NDArray[np.integer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicates:
    """Of the documents that were compared, of all sources: those that stand before, in their source or in one before it."""

    documents: tuple[int, ...]
    """Compared, of each source; all of them unless the corpus is too large."""
    tokens: tuple[int, ...]
    repeated: tuple[int, ...]
    repeated_tokens: tuple[int, ...]
    most: tuple[Copies, ...]
    held_out: tuple[int, ...]
    """Validation documents compared, of each source."""
    held_out_in_train: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Validation tokens in a span of SPAN or more that training text holds too."""

    searched_for: tuple[int, ...]
    """Validation tokens, of each source."""
    found: tuple[int, ...]
    searched: int
    """Train tokens; where these are not all, more may be found in the others."""


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """Documents of a split of a source."""

    hashes: Hashes  # [D]
    lengths: Numbers  # [D]
    shards: tuple[int, ...]  # documents of each shard


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Validation text to be searched for."""

    tokens: int
    blocks: Hashes
    spans: Hashes  # from each token on

    @classmethod
    def of(cls, run: NDArray[np.integer]) -> "_Run":
        values = _values(run)
        rolled = _rolled(values)
        return cls(len(run), rolled[::_EVERY], _spans(values, rolled, np.arange(len(run) - SPAN + 1)))


def duplicates(train: Sequence[TokenStream], held_out: Sequence[TokenStream], *, read: int, tell: Tell) -> Duplicates:
    """Compares the documents of all sources. read: tokens at most, nearly. tell: is told of the tokens that were read."""
    total = sum(int(stream.starts[-1]) for stream in (*train, *held_out))
    documents = sum(shard.documents for stream in (*train, *held_out) for shard in stream.shards)
    share = min(1.0, read / max(total, 1), _MOST_DOCUMENTS / max(documents, 1))
    parts = [_documents(stream, share, tell) for stream in train]
    others = [_documents(stream, share, tell) for stream in held_out]
    every = np.concatenate([part.hashes for part in parts])
    lengths = np.concatenate([part.lengths for part in parts])
    known, firsts, counts = np.unique(every, return_index=True, return_counts=True)
    again = np.ones(len(every), dtype=np.bool_)
    again[firsts] = False
    bounds = np.cumsum([len(part.hashes) for part in parts])[:-1]
    most = [at for at in np.lexsort((-lengths[firsts], -counts))[:_SHOWN].tolist() if counts[at] > 1]
    return Duplicates(
        documents=tuple(len(part.hashes) for part in parts),
        tokens=tuple(int(part.lengths.sum()) for part in parts),
        repeated=tuple(int(of.sum()) for of in np.split(again, bounds)),
        repeated_tokens=tuple(int(of.sum()) for of in np.split(np.where(again, lengths, 0), bounds)),
        most=tuple(Copies(count=int(counts[at]), tokens=_document(train, parts, share, int(firsts[at]))) for at in most),
        held_out=tuple(len(part.hashes) for part in others),
        held_out_in_train=tuple(int(_within(part.hashes, known).sum()) for part in others),
    )


def overlap(train: Sequence[TokenStream], held_out: Sequence[TokenStream], *, read: int, tell: Tell) -> Overlap:
    """Searches training text, of which `read` tokens at most, for spans of validation text."""
    total = sum(int(stream.starts[-1]) for stream in held_out)
    one_in = -(-total // _MOST_SEARCHED_FOR)
    runs = [[_Run.of(run) for run in _pieces(stream, _RUN, one_in)] for stream in held_out]
    blocks = _distinct([run.blocks for of_source in runs for run in of_source])
    wanted = _distinct([run.spans for of_source in runs for run in of_source])
    found = np.zeros(len(wanted), dtype=np.bool_)
    bits = max(16, int(np.ceil(np.log2(32 * max(len(blocks), 1)))))
    maybe = np.zeros(1 << bits, dtype=np.bool_)
    maybe[blocks >> np.uint64(64 - bits)] = True
    trained = sum(int(stream.starts[-1]) for stream in train)
    one_in = -(-trained // max(read, 1))
    pieces = (piece for stream in train for piece in _pieces(stream, _CHUNK, one_in, lookahead=SPAN - 1))
    searched = 0

    def search(piece: NDArray[np.integer]) -> int:
        if len(wanted):
            _search(_values(piece), blocks, wanted, found, maybe)
        return min(len(piece), _CHUNK)

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        for new in threads.map(search, pieces):
            searched += new
            tell(new)
    common = wanted[found]
    return Overlap(
        searched_for=tuple(sum(run.tokens for run in of_source) for of_source in runs),
        found=tuple(sum(_covered(_within(run.spans, common)) for run in of_source) for of_source in runs),
        searched=searched,
    )


def _documents(stream: TokenStream, share: float, tell: Tell) -> _Read:
    hashes: list[Hashes] = [np.zeros(0, np.uint64)]
    taken: list[Numbers] = [np.zeros(0, np.int64)]
    for index, shard in enumerate(stream.shards):
        lengths_D = document_lengths(stream.home, shard)
        ends_D = np.cumsum(lengths_D)
        drawn_D = _drawn(lengths_D, share)
        hashes.append(_hashed(stream.map(index), ends_D - lengths_D, ends_D, drawn_D, tell))
        taken.append(lengths_D[drawn_D])
    return _Read(np.concatenate(hashes), np.concatenate(taken), tuple(len(of_shard) for of_shard in hashes[1:]))


def _drawn(lengths_D: Numbers, share: float) -> NDArray[np.bool_]:
    """By their length alone."""
    if share >= 1:
        return np.ones(len(lengths_D), dtype=np.bool_)
    return (hashed(0, lengths_D) >> np.uint64(11)) * 2.0**-53 < share


def _hashed(tokens: NDArray[np.integer], starts_D: Numbers, ends_D: Numbers, drawn_D: NDArray[np.bool_], tell: Tell) -> Hashes:
    """Of the documents that are drawn, some at a time. Ids count, not how wide they are written."""
    found = np.empty(int(drawn_D.sum()), dtype=np.uint64)
    first = place = 0
    while first < len(ends_D):
        end = max(first + 1, int(np.searchsorted(ends_D, starts_D[first] + _DOCUMENTS_AT_ONCE, side="right")))
        here = first + np.flatnonzero(drawn_D[first:end])
        if len(here):
            base = int(starts_D[here[0]])
            raw = tokens[base : int(ends_D[here[-1]])].astype(np.uint32).data.cast("B")
            bounds = zip(((starts_D[here] - base) * 4).tolist(), ((ends_D[here] - base) * 4).tolist(), strict=True)
            for begin, stop in bounds:
                found[place] = xxhash.xxh3_64_intdigest(raw[begin:stop])
                place += 1
            tell(int((ends_D[here] - starts_D[here]).sum()))
        first = end
    return found


def _document(streams: Sequence[TokenStream], parts: Sequence[_Read], share: float, number: int) -> NDArray[np.integer]:
    """The tokens of a document by its number among all that were drawn."""
    for stream, part in zip(streams, parts, strict=True):
        for index, count in enumerate(part.shards):
            if number < count:
                lengths_D = document_lengths(stream.home, stream.shards[index])
                at = int(np.flatnonzero(_drawn(lengths_D, share))[number])
                start = int(lengths_D[:at].sum())
                return np.array(stream.map(index)[start : start + int(lengths_D[at])])
            number -= count
    raise IndexError(number)


def _distinct(parts: Sequence[Hashes]) -> Hashes:
    """Sorted. (np.unique, which hashes them once more, takes five times as long.)"""
    found = np.sort(np.concatenate([np.zeros(0, np.uint64), *parts]))
    return found[np.append(True, found[1:] != found[:-1])[: len(found)]]


def _within(some: Hashes, known_H: Hashes) -> NDArray[np.bool_]:
    """Which of these are among the known ones, which are sorted."""
    if not len(known_H):
        return np.zeros(len(some), dtype=np.bool_)
    return known_H[np.minimum(np.searchsorted(known_H, some), len(known_H) - 1)] == some


def _pieces(stream: TokenStream, size: int, one_in: int, lookahead: int = 0) -> Iterator[NDArray[np.integer]]:
    """Of a stream every so manieth piece of `size` tokens, and some beyond its end; pieces end with their shard."""
    number = 0
    for index, shard in enumerate(stream.shards):
        for begin in range(0, shard.tokens, size):
            if number % one_in == 0:
                yield stream.map(index)[begin : begin + size + lookahead]
            number += 1


def _values(tokens_N: NDArray[np.integer]) -> Hashes:
    """A number that looks drawn for each token."""
    return mix(tokens_N.astype(np.uint64) + np.uint64(1))


def _joined(left: Hashes, right: Hashes, length: int) -> Hashes:
    """Hashes of what is left, followed by `length` tokens more that are right."""
    return left * _factor(length) + right


@cache
def _factor(length: int) -> np.uint64:
    """Odd, and else anything."""
    return hashed(0, length)[0] | np.uint64(1)


def _rolled(values_N: Hashes) -> Hashes:
    """Of the _BLOCK tokens from each on."""
    by_length = {1: values_N}
    for length in (1, 2, 4, 8):
        shorter = by_length[length]
        by_length[2 * length] = _joined(shorter[:-length], shorter[length:], length)
    left, right = by_length[16], by_length[8][16:]
    return _joined(left[: len(right)], right, 8)


def _spans(values_N: Hashes, blocks_N: Hashes, starts: Numbers) -> Hashes:
    """Of the SPAN tokens from each of these on: of two blocks and two tokens."""
    found = _joined(blocks_N[starts], blocks_N[starts + _BLOCK], _BLOCK)
    for at in range(2 * _BLOCK, SPAN):
        found = _joined(found, values_N[starts + at], 1)
    return found


def _search(values_N: Hashes, blocks_H: Hashes, wanted_H: Hashes, found_H: NDArray[np.bool_], maybe: NDArray[np.bool_]) -> None:
    """Marks those of the wanted spans that stand in this piece of text."""
    starts = len(values_N) - SPAN + 1
    if starts <= 0:
        return
    rolled_N = _rolled(values_N)
    bits = np.uint64(64 - len(maybe).bit_length() + 1)
    hits = np.flatnonzero(maybe[rolled_N >> bits])
    hits = hits[_within(rolled_N[hits], blocks_H)]
    if not len(hits):
        return
    begins = np.bincount(np.maximum(hits - _EVERY + 1, 0), minlength=starts + 1)
    ends = np.bincount(np.minimum(hits + 1, starts), minlength=starts + 1)
    around = np.flatnonzero(np.cumsum(begins - ends)[:starts] > 0)
    spans = _spans(values_N, rolled_N, around)
    places = np.minimum(np.searchsorted(wanted_H, spans), len(wanted_H) - 1)
    found_H[places[wanted_H[places] == spans]] = True


def _covered(starts_N: NDArray[np.bool_]) -> int:
    """Tokens that stand in a span which begins at one of these."""
    changes = np.zeros(len(starts_N) + SPAN, dtype=np.int64)
    changes[: len(starts_N)] += starts_N
    changes[SPAN:] -= starts_N
    return int((np.cumsum(changes) > 0).sum())
