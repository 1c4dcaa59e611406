"""Statistics of a corpus equal direct counts: lengths of documents, the effect of packing, sources of windows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_cases import WAYS, open_way, write_sources

from manta.data.sampling.packing import best_fit
from manta.data.sampling.statistics import LengthHistogram, corpus_statistics, documents_cut, stream_of, windows_by_stream
from manta.data.shards import manifest
from manta.data.shards.windows import WindowShape

lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=60)


@settings(deadline=None)
@given(lengths)
def test_a_histogram_counts_each_document_and_token_once(some):
    octaves = LengthHistogram.of(np.array(some)).by_octave()
    rows = zip(octaves.edges[:-1], octaves.edges[1:], octaves.documents, octaves.tokens, strict=True)
    for first, end, documents, tokens in rows:
        inside = [length for length in some if first <= length < end]
        assert (len(inside), sum(inside), end) == (documents, tokens, 2 * first)
    assert octaves.documents.sum() == len(some)
    assert octaves.documents[0] * octaves.documents[-1] > 0


@settings(deadline=None)
@given(some=lengths, length=st.integers(2, 200), overlap=st.integers(0, 1), start=st.integers(0, 300))
def test_a_document_in_two_windows_counts_as_cut(some, length, overlap, start):
    inputs = np.repeat(np.arange(len(some)), some)
    windows = (start + np.arange(len(inputs))) // length
    several = sum(len(set(windows[inputs == document].tolist())) > 1 for document in range(len(some)))
    assert documents_cut(np.array(some), WindowShape(width=length + overlap, stride=length), start=start) == several


@pytest.mark.parametrize("by_shard", [False, True])
@pytest.mark.parametrize("way", ["one", "masked, packed"])
def test_packing_statistics_equal_those_of_the_samples(tmp_path, way, by_shard):
    samples = open_way(write_sources(tmp_path), **WAYS[way] | ({"shuffle_shards": 2} if by_shard else {}))
    shape = WindowShape(width=17, stride=16) if way == "one" else WindowShape(width=14, stride=14)
    (source,) = samples.sampler.sources
    found = [corpus_statistics(stream.home, manifest.load_manifest(stream.home), shape, apart=by_shard) for stream in source.streams]
    packings = [one.cut if way == "one" else one.best_fit for one in found]
    assert sum(packing.samples for packing in packings) == len(source.dataset)
    if way != "one":
        by_shard_lengths = [stream.home.read_index(shard).document_lengths() for stream in source.streams for shard in stream.shards]
        bins = [best_fit(lengths, shape.width, overlap=0) for lengths in by_shard_lengths]
        assert sum(packing.padding for packing in packings) == sum(len(one) * shape.width - int(one.lengths.sum()) for one in bins)
        assert sum(packing.cut for packing in packings) == sum(int((lengths > shape.width).sum()) for lengths in by_shard_lengths)


def test_a_window_is_attributed_to_the_source_of_its_text(tmp_path):
    folder = write_sources(tmp_path)
    for way in ({}, {"packing": "best_fit"}, {"shuffle_shards": 2}):
        (source,) = open_way(folder, **way).sampler.sources
        texts = [np.concatenate([stream.map(shard) for shard in range(len(stream.shards))]).tobytes() for stream in source.streams]
        read = source.dataset.read(np.arange(len(source.dataset)))
        for window in range(len(source.dataset)):
            first = read.tokens[window] if read.documents is None else read.tokens[window][read.documents[window] == 0]
            assert first.astype(np.uint16).tobytes() in texts[stream_of(source, window)]
        owners = [stream_of(source, window) for window in range(len(source.dataset))]
        assert windows_by_stream(source).tolist() == np.bincount(owners, minlength=2).tolist()
