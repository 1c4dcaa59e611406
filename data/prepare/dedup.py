"""Exact dedup: documents with the same tokens, and validation documents that training data contains.

Documents are compared by their hashes. Of a corpus too large to read, all documents of sampled lengths are read: equal documents have
one length, so either all copies of a document are read or none. Legend: D documents, H hashes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from manta.data.hashing import Hashes, hashed
from manta.data.shards.windows import TokenStream

_MAX_DOCUMENTS = 1 << 24  # compared: each takes about 70 bytes of memory
_CHUNK = 1 << 22  # tokens read at a time
_SHOWN = 5  # most frequent documents

Numbers = NDArray[np.int64]
Streams = Sequence[TokenStream]
Advance = Callable[[int], None]  # called with the tokens read since the last call


class Duplicates(NamedTuple):
    """Documents that repeat an earlier one of their source or of a source before it. Tuples have an entry per source."""

    documents: tuple[int, ...]
    """Documents compared: all of them unless the corpus is too large."""
    tokens: tuple[int, ...]
    repeated: tuple[int, ...]
    repeated_tokens: tuple[int, ...]
    most_frequent: tuple[tuple[int, NDArray[np.integer]], ...]
    """How often each occurs, and its tokens."""
    validation_documents: tuple[int, ...]
    validation_in_train: tuple[int, ...]


class _Sample(NamedTuple):
    """The sampled documents of one stream."""

    hashes: Hashes  # [D]
    lengths: Numbers  # [D]
    per_shard: tuple[int, ...]


def find_duplicates(train: Streams, validation: Streams, *, max_tokens: int, advance: Advance) -> Duplicates:
    """Compare the documents of all sources, about `max_tokens` at most."""
    streams = (*train, *validation)
    total = sum(stream.tokens for stream in streams)
    documents = sum(shard.documents for stream in streams for shard in stream.shards)
    share = min(1.0, max_tokens / max(total, 1), _MAX_DOCUMENTS / max(documents, 1))
    samples = [_sample(stream, share, advance) for stream in train]
    others = [_sample(stream, share, advance) for stream in validation]
    lengths = np.concatenate([sample.lengths for sample in samples])
    known, firsts, counts = np.unique(np.concatenate([sample.hashes for sample in samples]), return_index=True, return_counts=True)
    repeated = np.ones(len(lengths), dtype=np.bool_)
    repeated[firsts] = False
    bounds = np.cumsum([len(sample.hashes) for sample in samples])[:-1]
    most = [at for at in np.lexsort((-lengths[firsts], -counts))[:_SHOWN].tolist() if counts[at] > 1]
    return Duplicates(
        documents=tuple(len(sample.hashes) for sample in samples),
        tokens=tuple(int(sample.lengths.sum()) for sample in samples),
        repeated=tuple(int(part.sum()) for part in np.split(repeated, bounds)),
        repeated_tokens=tuple(int(part.sum()) for part in np.split(np.where(repeated, lengths, 0), bounds)),
        most_frequent=tuple((int(counts[at]), _document(train, samples, share, int(firsts[at]))) for at in most),
        validation_documents=tuple(len(sample.hashes) for sample in others),
        validation_in_train=tuple(int(is_among(sample.hashes, known).sum()) for sample in others),
    )


def is_among(hashes: Hashes, known_H: Hashes) -> NDArray[np.bool_]:
    """Return which hashes are among the known ones, which are sorted."""
    if not len(known_H):
        return np.zeros(len(hashes), dtype=np.bool_)
    return known_H[np.minimum(np.searchsorted(known_H, hashes), len(known_H) - 1)] == hashes


def _sample(stream: TokenStream, share: float, advance: Advance) -> _Sample:
    hashes: list[Hashes] = [np.zeros(0, np.uint64)]
    lengths: list[Numbers] = [np.zeros(0, np.int64)]
    for index, shard in enumerate(stream.shards):
        lengths_D = stream.home.read_index(shard).document_lengths()
        sampled_D = _is_sampled(lengths_D, share)
        hashes.append(_hash_documents(stream.map(index), lengths_D, sampled_D, advance))
        lengths.append(lengths_D[sampled_D])
    per_shard = tuple(len(shard) for shard in hashes[1:])
    return _Sample(hashes=np.concatenate(hashes), lengths=np.concatenate(lengths), per_shard=per_shard)


def _is_sampled(lengths_D: Numbers, share: float) -> NDArray[np.bool_]:
    if share >= 1:
        return np.ones(len(lengths_D), dtype=np.bool_)
    return (hashed(0, lengths_D) >> np.uint64(11)) * 2.0**-53 < share


def _hash_documents(tokens: NDArray[np.integer], lengths_D: Numbers, sampled_D: NDArray[np.bool_], advance: Advance) -> Hashes:
    """Hash the ids of sampled documents as 32-bit integers, so that the width of a shard's ids does not matter."""
    ends_D = np.cumsum(lengths_D)
    starts_D = ends_D - lengths_D
    hashes = [np.zeros(0, np.uint64)]
    first = 0
    while first < len(ends_D):
        end = max(first + 1, int(np.searchsorted(ends_D, starts_D[first] + _CHUNK, side="right")))
        chunk = first + np.flatnonzero(sampled_D[first:end])
        if len(chunk):
            base = int(starts_D[chunk[0]])
            raw = tokens[base : int(ends_D[chunk[-1]])].astype(np.uint32).data.cast("B")
            bounds = zip(((starts_D[chunk] - base) * 4).tolist(), ((ends_D[chunk] - base) * 4).tolist(), strict=True)
            hashes.append(np.fromiter((xxhash.xxh3_64_intdigest(raw[start:stop]) for start, stop in bounds), np.uint64, len(chunk)))
            advance(int(lengths_D[chunk].sum()))
        first = end
    return np.concatenate(hashes)


def _document(streams: Streams, samples: Sequence[_Sample], share: float, number: int) -> NDArray[np.integer]:
    """Return the tokens of a document by its number among all sampled ones."""
    for stream, sample in zip(streams, samples, strict=True):
        for index, count in enumerate(sample.per_shard):
            if number < count:
                lengths_D = stream.home.read_index(stream.shards[index]).document_lengths()
                at = int(np.flatnonzero(_is_sampled(lengths_D, share))[number])
                start = int(lengths_D[:at].sum())
                return np.array(stream.map(index)[start : start + int(lengths_D[at])])
            number -= count
    raise IndexError(number)
