"""The plan of a batch over ranks, and the learning rate: pure functions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.data.errors import InputError
from manta.trainer.config import ScheduleConfig, TrainConfig
from manta.trainer.layout import fits, plan
from manta.trainer.schedule import learning_rate

counts = st.integers(1, 24)


@given(micro=counts, turns=counts, ranks=counts, step=st.integers(0, 10**12))
def test_every_layout_reads_the_same_samples_each_step(micro, turns, ranks, step):
    layout = plan(TrainConfig(steps=1, global_batch=micro * turns, micro_batch=micro), ranks)
    assert layout.global_batch == micro * turns
    taken = [layout.samples(step=step, turn=t, rank=r) for t in range(layout.accumulation) for r in range(layout.data)]
    assert np.array_equal(np.sort(np.concatenate(taken)), step * layout.global_batch + np.arange(layout.global_batch))


@given(micro=counts, turns=counts, ranks=counts)
def test_as_many_ranks_work_as_the_batch_can_be_dealt_to(micro, turns, ranks):
    train = TrainConfig(steps=1, global_batch=micro * turns, micro_batch=micro)
    layout = plan(train, ranks)
    assert layout.data <= ranks
    assert not any(turns % more == 0 for more in range(layout.data + 1, min(ranks, turns) + 1))
    assert fits(train, layout.data) == layout


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(InputError, match="got 3 ranks, wants a divisor"):
        fits(TrainConfig(steps=1, global_batch=8, micro_batch=1), 3)


def test_the_learning_rate_warms_up_and_falls_to_its_minimum():
    schedule = ScheduleConfig(warmup_steps=10, minimum_ratio=0.1)
    rates = [learning_rate(schedule, peak=1.0, step=step, steps=100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(schedule, peak=1.0, step=500, steps=100) == pytest.approx(0.1)
