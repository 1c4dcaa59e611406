"""Batch-size ramp and sequence-length curriculum: which samples a step reads."""

from hypothesis import given
from hypothesis import strategies as st

from manta.data.sampling.timeline import Timeline


def stages(values):
    return st.lists(st.tuples(st.integers(1, 5000), st.sampled_from(values)), max_size=4, unique_by=lambda stage: stage[0]).map(
        lambda rest: [(0, values[0]), *sorted(rest)]
    )


def test_a_plain_run_has_one_phase():
    timeline = Timeline(sequence_length=8, global_batch=4)
    assert len(timeline.stages) == 1
    assert [timeline.first_sample(step) for step in (0, 1, 10**12)] == [0, 4, 4 * 10**12]
    assert timeline.tokens(3) == 96


def test_stages_take_effect_at_the_first_step_that_starts_at_their_tokens_or_later():
    timeline = Timeline(sequence_length=8, global_batch=8, ramp=[(0, 2), (40, 8)], curriculum=[(0, 4), (161, 8)])
    told = [(phase.first_step, phase.first_sample, phase.global_batch, phase.sequence_length) for phase in timeline.stages]
    # 2 samples are 16 tokens: 40 are reached within step 2, so step 3 is the first of 8 samples; 161 within that one's second
    assert told == [(0, 0, 2, 4), (3, 6, 8, 4), (5, 22, 8, 8)]
    assert [timeline.stage(step).global_batch for step in (0, 2, 3, 100)] == [2, 2, 8, 8]


def test_a_stage_shorter_than_a_step_has_none():
    timeline = Timeline(sequence_length=10, global_batch=4, ramp=[(0, 4), (41, 1), (50, 2)])
    assert [(phase.first_step, phase.global_batch) for phase in timeline.stages] == [(0, 4), (2, 2)]


@given(ramp=stages([1, 2, 4, 8]), curriculum=stages([2, 4, 8]), steps=st.integers(1, 200))
def test_every_sample_is_read_by_one_step(ramp, curriculum, steps):
    timeline = Timeline(sequence_length=8, global_batch=8, ramp=ramp, curriculum=curriculum)
    read = [
        (step, sample)
        for step in range(steps)
        for sample in range(timeline.first_sample(step), timeline.first_sample(step) + timeline.stage(step).global_batch)
    ]
    assert [sample for _, sample in read] == list(range(timeline.first_sample(steps)))
    assert all(timeline.step_of(sample) == step for step, sample in read)
    for step in range(steps):
        begun = timeline.tokens(step)
        assert timeline.stage(step).global_batch == [batch for tokens, batch in ramp if tokens <= begun][-1]
        assert timeline.stage(step).sequence_length == [length for tokens, length in curriculum if tokens <= begun][-1]
