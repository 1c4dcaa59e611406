"""The order of samples is a permutation: uniform, frozen, and the same on any number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.data.sampling.order import BlockOrder, Order, Permutation

seeds = st.integers(-(2**70), 2**70)


@settings(deadline=None)
@given(n=st.integers(1, 5000), key=seeds)
def test_a_permutation_is_a_bijection(n, key):
    assert np.array_equal(np.sort(Permutation(n, key)(np.arange(n))), np.arange(n))


@settings(deadline=None)
@given(n=st.integers(2**40, 2**62 - 1), key=seeds, start=st.integers(0, 2**39))
def test_a_large_permutation_stays_in_range_without_repeats(n, key, start):
    samples = Permutation(n, key)(np.arange(start, start + 500))
    assert samples.max() < n
    assert len(np.unique(samples)) == 500


@pytest.mark.parametrize("n", [0, -1, 2**62])
def test_a_permutation_of_invalid_size_is_refused(n):
    with pytest.raises(ValueError, match="between 1 and"):
        Permutation(n, 0)


def test_the_permutation_is_frozen():
    """Golden vectors: a change would change every started run."""
    assert Permutation(10, 0)(np.arange(10)).tolist() == [4, 5, 2, 1, 8, 6, 3, 0, 9, 7]
    million = Permutation(1_000_003, 42)(np.array([0, 1, 2, 500_000, 1_000_002]))
    assert million.tolist() == [353176, 597631, 249000, 158509, 561742]
    vast = Permutation(2**61 + 1, -1)(np.array([0, 1, 2**61]))
    assert vast.tolist() == [1350212778371731590, 994379701366908520, 823517992665940241]


def test_the_order_is_frozen():
    epochs, windows = Order(1000, seed=7)(np.array([0, 1, 999, 1000, 1999, 2000, 10**12, 10**12 + 1]))
    assert epochs.tolist() == [0, 0, 0, 1, 1, 2, 10**9, 10**9]
    assert windows.tolist() == [69, 225, 807, 772, 520, 262, 544, 242]
    assert Order(9389, seed=1234)(np.array([0, 1, 2, 3, 9388, 9389]))[1].tolist() == [7984, 5566, 4503, 9048, 809, 2627]


@settings(deadline=None)
@given(n=st.integers(1, 300), seed=seeds, epoch=st.integers(0, 10**9))
def test_every_window_is_read_once_per_epoch(n, seed, epoch):
    epochs, windows = Order(n, seed)(np.arange(epoch * n, (epoch + 1) * n))
    assert set(epochs.tolist()) == {epoch}
    assert sorted(windows.tolist()) == list(range(n))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 1000), seed=seeds, global_batch=st.integers(1, 48), step=st.integers(0, 10**6))
def test_a_global_batch_is_the_same_on_1_to_24_ranks(n, seed, global_batch, step):
    """A batch may span epochs. The parts that the ranks read make up the batch that a single rank would read."""
    order = Order(n, seed)
    numbers = step * global_batch + np.arange(global_batch)
    alone = order(numbers)[1]
    for ranks in range(1, 25):
        together = np.empty_like(alone)
        for rank in range(ranks):
            together[rank::ranks] = order(numbers[rank::ranks])[1]
        assert np.array_equal(together, alone)


def test_epochs_and_seeds_have_different_orders():
    orders = [tuple(Order(500, seed)(np.arange(500) + 500 * epoch)[1].tolist()) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == len(orders)


def test_consecutive_samples_are_far_apart_in_the_corpus():
    """A serial test: distances between consecutive samples are distributed as by chance."""
    n = 1 << 16
    windows = Order(n, seed=3)(np.arange(n))[1].astype(np.int64)
    counts = np.bincount(((windows[1:] - windows[:-1]) % n) * 64 // n, minlength=64)
    expected = (n - 1) / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 6 * np.sqrt(2 * 63)


counts = st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any)


@settings(deadline=None)
@given(counts=counts, shards_per_block=st.integers(1, 25), seed=seeds, epoch=st.integers(0, 10**9))
def test_a_block_order_reads_every_window_once_per_epoch(counts, shards_per_block, seed, epoch):
    order = BlockOrder(np.array(counts), seed, shards_per_block=shards_per_block)
    epochs, windows = order(np.arange(epoch * order.n, (epoch + 1) * order.n))
    assert set(epochs.tolist()) == {epoch}
    assert sorted(windows.tolist()) == list(range(sum(counts)))


@settings(deadline=None, max_examples=30)
@given(counts=counts, shards_per_block=st.integers(1, 25), seed=seeds, number=st.integers(0, 10**6))
def test_a_block_needs_only_its_shards_and_lists_the_next_ones(counts, shards_per_block, seed, number):
    order = BlockOrder(np.array(counts), seed, shards_per_block=shards_per_block)
    owners = np.repeat(np.arange(len(counts)), counts)
    numbers = np.arange(number, number + order.n)
    blocks = [order.block(int(one)) for one in numbers]
    shards = owners[order(numbers)[1].astype(np.int64)]
    for block in set(blocks):
        of_block = {int(shard) for shard, its in zip(shards, blocks, strict=True) if its == block}
        assert len(of_block) <= shards_per_block
        assert of_block <= set(order.upcoming_shards(int(numbers[blocks.index(block)])))
    after = blocks.index(blocks[-1])
    if after:  # the next block's shards are listed, too
        assert {int(shard) for shard in shards[after:]} <= set(order.upcoming_shards(int(numbers[after - 1])))


def test_blocks_are_shuffled_differently_each_epoch():
    order = BlockOrder(np.full(12, 5), seed=1, shards_per_block=3)
    epochs = [tuple(order(np.arange(60) + 60 * epoch)[1].tolist()) for epoch in range(4)]
    assert len(set(epochs)) == 4
    assert {block for number in range(120) for block in [order.block(number)]} == {(e, b) for e in range(2) for b in range(4)}
