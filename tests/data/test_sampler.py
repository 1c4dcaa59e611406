"""Mixtures, blocks, packing and skips: each sample is read once, by any number of ranks, and any sample is read quickly."""

import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_cases import WAYS, T, config_of, open_way, same_examples, write_sources
from small_corpora import SMALL

from manta.data.config import TokenizerConfig
from manta.data.errors import InputError
from manta.data.objectives.examples import IGNORED
from manta.data.prepare import prepare
from manta.data.sampling.samples import Samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two sources, with eight shards and one shard."""
    return write_sources(tmp_path_factory.mktemp("sampler"), shards=8, code_documents=40)


@pytest.fixture(scope="module")
def opened(folder):
    """Opens the samples of each way once."""
    return cache(lambda way: open_way(folder, **WAYS[way]))


def locations(samples: Samples, read_indices: np.ndarray) -> list[tuple[int, int, int]]:
    """Return each sample's source, epoch and window."""
    sources, own = samples.sampler.locate(samples.sampler.sample_numbers(read_indices))
    orders = [source.order for source in samples.sampler.sources]
    return [(int(a), *(int(x[0]) for x in orders[a](np.array([b])))) for a, b in zip(sources, own, strict=True)]


@pytest.mark.parametrize("way", WAYS)
def test_every_sample_is_read_once_per_epoch(opened, way):
    samples = opened(way)
    read = locations(samples, np.arange(3 * sum(len(source.dataset) for source in samples.sampler.sources)))
    assert len(set(read)) == len(read)
    for index, sampler in enumerate(samples.sampler.sources):
        own = [(epoch, window) for source, epoch, window in read if source == index]
        whole = [(epoch, window) for epoch in range(own[-1][0] - 1) for window in range(len(sampler.dataset))]
        skipped = sum(end - first for first, end in WAYS[way].get("skip", ()))
        assert len(set(whole) - set(own)) <= skipped


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=5, deadline=None)
@given(step=st.integers(0, 10**5), global_batch=st.integers(1, 48))
def test_a_global_batch_is_the_same_on_1_to_24_ranks(opened, way, step, global_batch):
    """So a run can change from any number of ranks to any other at any step."""
    samples = opened(way)
    count = step * global_batch + np.arange(global_batch)
    alone = samples.train(count)
    for ranks in range(1, 25):
        for rank in range(min(ranks, global_batch)):
            part = samples.train(count[rank::ranks])
            assert np.array_equal(part.tokens, alone.tokens[rank::ranks])
            assert np.array_equal(part.targets, alone.targets[rank::ranks])


@pytest.mark.parametrize("way", WAYS)
def test_reopened_samples_continue_quickly_with_the_same_examples(opened, folder, way):
    count = 10**12 + np.arange(16)
    expected = opened(way).train(count)
    reopened = open_way(folder, **WAYS[way])
    reopened.train(np.arange(200))  # shards are mapped on first use
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        got = reopened.train(count)
        seconds.append(time.perf_counter() - start)
        count += 10**9
    assert same_examples(reopened.train(10**12 + np.arange(16)), expected)
    assert not same_examples(got, expected)
    assert min(seconds) < 0.005


def test_skipped_samples_are_not_read(opened, folder):
    skipping, whole = opened("skipping"), open_way(folder, mixture=WAYS["skipping"]["mixture"])
    numbers = [number for number in range(1000) if not (10 <= number < 20 or 500 <= number < 900)]
    got = skipping.train(np.arange(len(numbers)))
    assert got.samples.tolist() == numbers
    assert same_examples(got, whole.train(np.array(numbers)))
    assert sum(skipping.sampler.samples_by_source(300)) == 300


def test_a_mixture_has_its_shares(opened):
    samples = opened("mixed")
    sources, _ = samples.sampler.locate(np.arange(1700))
    assert [int((sources[:700] == source).sum()) for source in (0, 1)] == [490, 210]
    assert [int((sources[700:] == source).sum()) for source in (0, 1)] == [100, 900]
    assert samples.sampler.samples_by_source(1700) == [590, 1110]


def test_other_sources_do_not_change_the_order_of_a_source(opened, folder):
    """The order of a source depends on its name. Other sources change when its samples are read, not their order."""
    both = opened("mixed")
    tokens = TokenizerConfig(file=prepare.find_prepared(config_of(folder, **WAYS["mixed"]), SMALL).tokenizer)
    alone = open_way(folder, tokens, sources={"code": str(folder / "code.jsonl")}, mixture={"code": 1.0})
    numbers = np.arange(50)
    assert np.array_equal(both.sampler.sources[1].order(numbers)[1], alone.sampler.sources[0].order(numbers)[1])
    one = open_way(folder, tokens, sources={"kode": str(folder / "code.jsonl")}, mixture={"kode": 1.0})
    assert not np.array_equal(one.sampler.sources[0].order(numbers)[1], alone.sampler.sources[0].order(numbers)[1])


def test_a_source_is_not_read_more_often_than_its_epochs(folder):
    sources = {"web": str(folder / "web"), "code": {"path": str(folder / "code.jsonl"), "epochs": 1.5}}
    samples = open_way(folder, sources=sources, mixture={"web": 0.5, "code": 0.5})
    most = 2 * int(1.5 * len(samples.sampler.sources[1].dataset))
    samples.sampler.check_epochs(most - 2)
    with pytest.raises(InputError, match=r"data\.sources: code: expected at most 1\.5 epochs, got 1\.\d\d .* Shorten the run"):
        samples.sampler.check_epochs(most + 4)


def test_packed_samples_hold_whole_documents(opened):
    """Documents are numbered in order, and padding predicts nothing."""
    samples = opened("packed in blocks")
    read = samples.train(np.arange(len(samples.sampler.sources[0].dataset)))
    for numbers in read.documents:
        real = numbers[numbers >= 0]
        assert real[0] == 0
        assert set(np.diff(real).tolist()) <= {0, 1}
    assert (read.documents < 0).mean() < 0.05
    assert (read.targets[read.documents < 0] == IGNORED).all()


def test_shorter_sequences_hold_the_same_tokens(folder):
    samples = open_way(folder, curriculum=({"sequence_length": 4}, {"from_tokens": 100, "sequence_length": T}))
    long, short = samples.train(np.arange(10)), samples.train(np.arange(10), sequence_length=4)
    assert short.tokens.shape == (40, 4)
    assert np.array_equal(short.tokens.reshape(10, T), long.tokens)
    assert np.array_equal(short.targets.reshape(10, T), long.targets)
    assert short.part.tolist() == [0, 1, 2, 3] * 10
    assert short.samples.tolist() == np.repeat(np.arange(10), 4).tolist()
