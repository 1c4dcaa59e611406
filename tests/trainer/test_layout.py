"""The plan of a batch over ranks, and the learning rate: pure functions."""

from itertools import chain, product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from manta.data.errors import InputError
from manta.trainer.config.training import BatchConfig, ParallelConfig, ScheduleConfig, TrainConfig
from manta.trainer.dist.layout import fits, plan, sizes, smaller
from manta.trainer.optim.schedules import learning_rate

counts = st.integers(1, 24)


def ramp(micro: int, turns: list[int]) -> TrainConfig:
    """A stage for each number of micro batches a step."""
    stages = tuple(BatchConfig(from_tokens=1000 * stage, global_batch=micro * count) for stage, count in enumerate(turns))
    return TrainConfig(steps=1, global_batch=micro * turns[-1], micro_batch=micro, batch_ramp=stages if len(turns) > 1 else ())


@given(micro=counts, turns=st.lists(counts, min_size=1, max_size=4), ranks=counts, first=st.integers(0, 10**12))
def test_every_layout_reads_the_same_samples_each_step(micro, turns, ranks, first):
    layout = plan(ramp(micro, turns), ranks)
    for global_batch in (micro * count for count in turns):
        accumulation = layout.accumulation(global_batch)
        assert layout.data * micro * accumulation == global_batch
        taken = [layout.samples(first=first, turn=t, rank=r) for t in range(accumulation) for r in range(layout.data)]
        assert np.array_equal(np.sort(np.concatenate(taken)), first + np.arange(global_batch))


@given(micro=counts, turns=st.lists(counts, min_size=1, max_size=4), ranks=counts)
def test_as_many_ranks_work_as_every_batch_of_the_run_can_be_dealt_to(micro, turns, ranks):
    train = ramp(micro, turns)
    layout = plan(train, ranks)
    assert layout.data <= ranks
    assert not any(all(count % more == 0 for count in turns) for more in range(layout.data + 1, ranks + 1))
    assert fits(train, layout.data) == layout


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(InputError, match=r"got 3 ranks, wants a divisor of train.global_batch 8 / train.micro_batch 1; start 2 ranks"):
        fits(TrainConfig(steps=1, global_batch=8, micro_batch=1), 3)
    with pytest.raises(
        InputError, match=r"got 4 ranks, wants a divisor of each of train.batch_ramp's 4, 12, 8 / train.micro_batch 2; start 2 ra"
    ):
        fits(ramp(2, [2, 6, 4]), 4)


@given(micro=counts, turns=st.lists(counts, min_size=1, max_size=4), shares=st.tuples(*3 * [st.sampled_from([1, 2, 3, 4, 6, 8])]))
def test_too_few_ranks_have_sizes_that_divide_those_of_the_config_and_as_large_as_can_be(micro, turns, shares):
    train = ramp(micro, turns)
    parallel = ParallelConfig(tensor=shares[0], sequence=shares[1], expert=shares[2])
    assume(sizes(train, parallel))
    instead = smaller(train, parallel)
    assert instead.keys() == set(range(1, min(sizes(train, parallel)))) & set(chain.from_iterable(_sizes_of_divisors(train, shares)))
    for ranks, found in instead.items():
        layout = fits(train, ranks, parallel, shrinks=True)
        assert (layout.tensor, layout.sequence, layout.expert) == (found.tensor, found.sequence, found.expert)
        assert parallel.tensor % found.tensor == parallel.sequence % found.sequence == parallel.expert % found.expert == 0
        assert not any(
            ranks in sizes(train, ParallelConfig(tensor=larger, sequence=sequence, expert=expert))
            for larger, sequence, expert in product(*map(divisors, shares))
            if larger > found.tensor
        )
        with pytest.raises(InputError):
            fits(train, ranks, parallel)


def _sizes_of_divisors(train, shares):
    return [sizes(train, ParallelConfig(tensor=t, sequence=s, expert=e)) for t, s, e in product(*map(divisors, shares))]


def divisors(number):
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def test_the_learning_rate_warms_up_and_falls_to_its_minimum():
    schedule = ScheduleConfig(warmup_steps=10, minimum_ratio=0.1)
    rates = [learning_rate(schedule, peak=1.0, step=step, steps=100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(schedule, peak=1.0, step=500, steps=100) == pytest.approx(0.1)
