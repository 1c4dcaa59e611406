"""Batch-size ramp and sequence-length curriculum: which samples a step reads."""

from hypothesis import given
from hypothesis import strategies as st

from manta.data.sampling.step_samples import Timeline


def stages(values):
    return st.lists(st.tuples(st.integers(1, 5000), st.sampled_from(values)), max_size=4, unique_by=lambda stage: stage[0]).map(
        lambda rest: [(0, values[0]), *sorted(rest)]
    )


def test_a_run_without_stages_has_one():
    timeline = Timeline(sequence_length=8, global_batch=4)
    assert len(timeline.stages) == 1
    assert [timeline.first_sample(step) for step in (0, 1, 10**12)] == [0, 4, 4 * 10**12]
    assert timeline.tokens(3) == 96


def test_a_stage_starts_at_the_first_step_at_or_after_its_tokens():
    timeline = Timeline(sequence_length=8, global_batch=8, ramp=[(0, 2), (40, 8)], curriculum=[(0, 4), (161, 8)])
    found = [(stage.first_step, stage.first_sample, stage.global_batch, stage.sequence_length) for stage in timeline.stages]
    # 2 samples are 16 tokens, so 40 tokens are reached within step 2, and step 3 is the first of 8 samples. Step 4 reaches 161 tokens.
    assert found == [(0, 0, 2, 4), (3, 6, 8, 4), (5, 22, 8, 8)]
    assert [timeline.stage(step).global_batch for step in (0, 2, 3, 100)] == [2, 2, 8, 8]


def test_a_stage_shorter_than_a_step_is_dropped():
    timeline = Timeline(sequence_length=10, global_batch=4, ramp=[(0, 4), (41, 1), (50, 2)])
    assert [(stage.first_step, stage.global_batch) for stage in timeline.stages] == [(0, 4), (2, 2)]


@given(ramp=stages([1, 2, 4, 8]), curriculum=stages([2, 4, 8]), steps=st.integers(1, 200))
def test_every_sample_is_read_by_one_step(ramp, curriculum, steps):
    timeline = Timeline(sequence_length=8, global_batch=8, ramp=ramp, curriculum=curriculum)
    read = [sample for step in range(steps) for sample in range(timeline.first_sample(step), timeline.first_sample(step + 1))]
    assert read == list(range(timeline.first_sample(steps)))
    for step in range(steps):
        assert timeline.first_sample(step + 1) == timeline.first_sample(step) + timeline.stage(step).global_batch
        start = timeline.tokens(step)
        assert timeline.stage(step).global_batch == [batch for tokens, batch in ramp if tokens <= start][-1]
        assert timeline.stage(step).sequence_length == [length for tokens, length in curriculum if tokens <= start][-1]
