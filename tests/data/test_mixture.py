"""Mixtures: shares by weight, in stages, with no sample lost between stages, and the same on any number of ranks."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.data.sampling.mixture import PERIOD, Mixture, quotas, spread

weights = st.lists(st.floats(0.001, 1), min_size=1, max_size=6)


@st.composite
def mixtures(draw):
    sources = draw(st.integers(1, 5))
    some = st.lists(st.floats(0, 1), min_size=sources, max_size=sources).filter(lambda shares: sum(shares) > 0.01)
    starts = [0, *sorted(draw(st.sets(st.integers(1, 3 * PERIOD), max_size=3)))]
    return [(start, draw(some)) for start in starts]


@settings(deadline=None, max_examples=25)
@given(stages=mixtures(), first=st.integers(0, 4 * PERIOD), count=st.integers(1, 5000))
def test_the_samples_of_a_source_are_read_in_order(stages, first, count):
    """Across periods and stages, none is lost and none is read twice."""
    mixture = Mixture(stages)
    sources, own = mixture(np.arange(first, first + count))
    before, after = mixture.samples_before(first), mixture.samples_before(first + count)
    for source in range(len(before)):
        assert own[sources == source].tolist() == list(range(before[source], after[source]))
    assert after.sum() == first + count


@settings(deadline=None, max_examples=15)
@given(stages=mixtures(), step=st.integers(0, 10**6), global_batch=st.integers(1, 48))
def test_a_global_batch_is_the_same_on_1_to_24_ranks(stages, step, global_batch):
    mixture = Mixture(stages)
    numbers = step * global_batch + np.arange(global_batch)
    alone = np.stack(mixture(numbers))
    for ranks in range(1, 25):
        together = np.empty_like(alone)
        for rank in range(ranks):
            together[:, rank::ranks] = mixture(numbers[rank::ranks])
        assert np.array_equal(together, alone)


@settings(deadline=None, max_examples=25)
@given(weights)
def test_shares_equal_the_weights_at_every_moment(shares):
    counts = quotas(shares)
    wanted = np.array(shares) / np.sum(shares)
    assert counts.sum() == PERIOD
    assert np.abs(counts / PERIOD - wanted).max() <= len(shares) / PERIOD
    sources = spread(counts)
    for source, count in enumerate(counts):
        so_far = np.cumsum(sources == source)
        ideal = count / PERIOD * np.arange(1, PERIOD + 1)
        assert np.abs(so_far - ideal).max() <= (len(shares) + 1) / 2  # samples


def test_a_source_with_a_tiny_weight_is_read():
    assert quotas([1.0, 1e-9]).tolist() == [PERIOD - 1, 1]
    assert quotas([1e-9] * 3 + [1.0]).tolist() == [1, 1, 1, PERIOD - 3]
    assert quotas([1.0, 0.0]).tolist() == [PERIOD, 0]


def test_a_source_continues_after_a_stage_without_it():
    mixture = Mixture([(0, [1, 1]), (100, [1, 0]), (200, [0, 1])])
    sources, own = mixture(np.arange(300))
    assert set(sources[100:200]) == {0}
    assert own[sources == 1].tolist() == list(range(150))
    assert mixture.samples_before(250).tolist() == [150, 100]


@pytest.mark.parametrize("number", [10**12, 10**12 + PERIOD - 3])
def test_any_sample_is_located_quickly(number):
    mixture = Mixture([(0, [0.7, 0.3]), (10**9, [0.2, 0.8])])
    start = time.perf_counter()
    mixture(np.arange(number, number + 256))
    assert time.perf_counter() - start < 0.005
