"""Packing: no document that fits is cut, each token is in one bin, and bins are almost full."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.data.sampling.packing import best_fit


def pieces(bins):
    """Return (first token, length) of every piece, by bin."""
    edges = bins.edges.tolist()
    return [list(zip(bins.starts[a:b].tolist(), bins.lengths[a:b].tolist(), strict=True)) for a, b in pairwise(edges)]


documents = st.lists(st.integers(1, 70), max_size=60)


@settings(deadline=None)
@given(lengths=documents, width=st.integers(2, 40), overlap=st.integers(0, 1))
def test_a_document_that_fits_is_whole_in_one_bin(lengths, width, overlap):
    lengths = np.array(lengths, dtype=np.int64)
    placed = [piece for contents in pieces(best_fit(lengths, width, overlap=overlap)) for piece in contents]
    starts = np.cumsum(lengths) - lengths
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        if length <= width:
            assert placed.count((start, length)) == 1


@settings(deadline=None)
@given(lengths=documents, width=st.integers(2, 40), overlap=st.integers(0, 1))
def test_each_token_is_in_one_bin_and_no_bin_overflows(lengths, width, overlap):
    """With overlap, consecutive pieces of a long document share a token, so that each token is predicted once."""
    bins = pieces(best_fit(np.array(lengths, dtype=np.int64), width, overlap=overlap))
    assert all(contents and sum(length for _, length in contents) <= width for contents in bins)
    ends = set(np.cumsum(lengths).tolist())
    predicted = [at for contents in bins for start, length in contents for at in range(start + overlap, start + length)]
    first = {end - length for end, length in zip(sorted(ends), lengths, strict=True)}
    everything = [at for at in range(sum(lengths)) if not (overlap and at in first)]
    assert sorted(predicted) == everything


def test_bins_are_full():
    """Documents have log-normal lengths, like web pages."""
    lengths = np.random.default_rng(0).lognormal(6, 1, 100_000).astype(np.int64) + 1
    bins = best_fit(lengths, 1025)
    assert bins.lengths.sum() / (1025 * len(bins)) > 0.999
    again = best_fit(lengths, 1025)
    assert np.array_equal(bins.starts, again.starts)


def test_bins_are_not_ordered_by_length():
    lengths = np.random.default_rng(1).integers(1, 65, 20_000)
    bins = best_fit(lengths, 65)
    longest = np.maximum.reduceat(bins.lengths, bins.edges[:-1])
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.05


def test_no_documents_make_no_bins():
    assert len(best_fit(np.zeros(0, dtype=np.int64), 8)) == 0
