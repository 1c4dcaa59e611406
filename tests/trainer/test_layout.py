"""How samples and weights are laid out over ranks, and the learning rate of a step: pure functions."""

from dataclasses import replace
from itertools import chain, product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from manta.data.errors import InputError
from manta.trainer.config.sections import BatchConfig, ParallelConfig, ScheduleConfig, TrainConfig
from manta.trainer.dist.layout import Layout, largest_layout, layout_for, layout_from_environment, layouts, shrunk_layouts
from manta.trainer.optim.schedules import learning_rate

counts = st.integers(1, 24)
batch_counts = st.lists(counts, min_size=1, max_size=4)  # micro batches per step, a number for each stage of a batch ramp


def ramp(micro_batch: int, stages: list[int]) -> TrainConfig:
    """Return a config with one stage for each number of micro batches per step."""
    batches = [micro_batch * count for count in stages]
    batch_ramp = tuple(BatchConfig(from_tokens=1000 * stage, global_batch=batch) for stage, batch in enumerate(batches))
    return TrainConfig(steps=1, global_batch=batches[-1], micro_batch=micro_batch, batch_ramp=batch_ramp if len(stages) > 1 else ())


@given(micro=counts, stages=batch_counts, ranks=counts, first=st.integers(0, 10**12))
def test_every_layout_reads_the_same_samples_each_step(micro, stages, ranks, first):
    layout = largest_layout(ramp(micro, stages), ParallelConfig(), ranks)
    for global_batch in (micro * count for count in stages):
        accumulation = layout.accumulation(global_batch)
        assert layout.data * micro * accumulation == global_batch
        samples = [
            layout.samples_of_rank(first=first, micro_step=micro_step, rank=rank)
            for micro_step in range(accumulation)
            for rank in range(layout.data)
        ]
        assert np.array_equal(np.sort(np.concatenate(samples)), first + np.arange(global_batch))


@given(micro=counts, stages=batch_counts, ranks=counts)
def test_the_most_ranks_that_divide_every_batch_are_used(micro, stages, ranks):
    train = ramp(micro, stages)
    layout = largest_layout(train, ParallelConfig(), ranks)
    assert layout.data <= ranks
    assert not any(all(count % more == 0 for count in stages) for more in range(layout.data + 1, ranks + 1))
    assert layout_for(train, ParallelConfig(), layout.data) == layout


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(
        InputError, match=r"WORLD_SIZE: expected a divisor of train.global_batch 8 / train.micro_batch 1, got 3 ranks. Start 2 ranks"
    ):
        layout_for(TrainConfig(steps=1, global_batch=8, micro_batch=1), ParallelConfig(), 3)
    with pytest.raises(
        InputError, match=r"expected a divisor of each of train.batch_ramp's 4, 12, 8 / train.micro_batch 2, got 4 ranks. Start 2 ranks"
    ):
        layout_for(ramp(2, [2, 6, 4]), ParallelConfig(), 4)


@given(micro=counts, stages=batch_counts, sizes=st.tuples(*3 * [st.sampled_from([1, 2, 3, 4, 6, 8])]))
def test_too_few_ranks_get_the_largest_sizes_that_divide(micro, stages, sizes):
    train = ramp(micro, stages)
    parallel = parallel_of(*sizes)
    assume(layouts(train, parallel))
    shrunk = shrunk_layouts(train, parallel)
    possible = chain.from_iterable(layouts(train, parallel_of(*smaller)) for smaller in product(*map(divisors, sizes)))
    assert shrunk.keys() == set(range(1, min(layouts(train, parallel)))) & set(possible)
    for ranks, layout in shrunk.items():
        assert layout_for(train, parallel, ranks, may_shrink=True) == layout
        assert parallel.tensor % layout.tensor == parallel.sequence % layout.sequence == parallel.expert % layout.expert == 0
        assert not any(
            ranks in layouts(train, parallel_of(tensor, sequence, expert))
            for tensor, sequence, expert in product(*map(divisors, sizes))
            if tensor > layout.tensor
        )
        with pytest.raises(InputError):
            layout_for(train, parallel, ranks)


def parallel_of(tensor: int, sequence: int, expert: int) -> ParallelConfig:
    return ParallelConfig(tensor=tensor, sequence=sequence, expert=expert)


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@given(micro=counts, stages=batch_counts, sizes=st.tuples(*3 * [st.sampled_from([1, 2, 4])]))
def test_ranks_receive_the_layout_that_the_launcher_computed(micro, stages, sizes):
    train, parallel = ramp(micro, stages), parallel_of(*sizes)
    for ranks, layout in (layouts(train, parallel) | shrunk_layouts(train, parallel)).items():
        with pytest.MonkeyPatch.context() as environment:
            for name, value in layout.to_environment().items():
                environment.setenv(name, value)
            assert layout_from_environment(train, parallel, ranks) == layout


def test_ranks_without_a_launcher_compute_their_layout(monkeypatch):
    monkeypatch.delenv("MANTA_LAYOUT", raising=False)
    train = TrainConfig(steps=1, global_batch=8, micro_batch=2)
    assert layout_from_environment(train, ParallelConfig(tensor=2), 4) == Layout(data=2, micro_batch=2, tensor=2)


@pytest.mark.parametrize(
    "change", [{"data": 3}, {"micro_batch": 4}, {"tensor": 4}, {"expert": 8}, {"zero": 2}, {"offload": True}, {"data": 4}], ids=str
)
def test_ranks_refuse_a_layout_that_does_not_suit_the_config(change, monkeypatch):
    train, parallel = TrainConfig(steps=1, global_batch=8, micro_batch=2), ParallelConfig(tensor=2)
    layout = layout_for(train, parallel, 4)
    for name, value in replace(layout, **change).to_environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"MANTA_LAYOUT: expected a layout of 4 ranks that suits config\.yaml, got .*\. Start the ranks"):
        layout_from_environment(train, parallel, 4)


def test_ranks_refuse_a_layout_that_they_cannot_read(monkeypatch):
    monkeypatch.setenv("MANTA_LAYOUT", "data 2")
    with pytest.raises(InputError, match=r"MANTA_LAYOUT: expected a layout in JSON, got 'data 2'"):
        layout_from_environment(TrainConfig(steps=1, global_batch=8, micro_batch=2), ParallelConfig(), 2)


def test_the_learning_rate_warms_up_and_falls_to_its_minimum():
    schedule = ScheduleConfig(warmup_steps=10, minimum_ratio=0.1)
    rates = [learning_rate(schedule, peak=1.0, step=step, steps=100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(schedule, peak=1.0, step=500, steps=100) == pytest.approx(0.1)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_a_schedule_of_its_own_length_goes_on_at_its_minimum(shape):
    first, own = (ScheduleConfig(shape=shape, warmup_steps=10, steps=steps) for steps in (None, 100))
    planned = [learning_rate(first, peak=1.0, step=step, steps=100) for step in range(100)]
    extended = [learning_rate(own, peak=1.0, step=step, steps=150) for step in range(150)]
    assert extended[:100] == planned
    assert extended[100:] == [planned[-1]] * 50
    shortened = [learning_rate(own, peak=1.0, step=step, steps=50) for step in range(50)]
    assert shortened == planned[:50]
