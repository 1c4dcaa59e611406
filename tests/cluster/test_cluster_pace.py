"""A slow rank is named, once; and how long a step may be silent is learned."""

import re

import pytest
from cluster_scene import Scene
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.cluster.supervise.failure import RankStatus
from manta.cluster.supervise.stragglers import KNOWN, LONGEST, LOOKS, SHORTEST, Pace, limits, slow

works = st.floats(0.05, 100.0)


def status(rank, step, work, **told):
    known = {"pid": 1, "phase": "step", "quiet": 0.0, "has_stepped": True, **told}
    return RankStatus(rank=rank, step=step, work=work, **known)


NO_DEADLINE = settings(deadline=None)  # on a busy machine a process may wait for long


def told_of(steps):
    """Of the work of each rank, step by step: who is told of at which step."""
    pace, told = Pace(), []
    for step, work in enumerate(steps):
        for _ in range(2):  # looks are more frequent than steps
            pace, new = slow([status(rank, step, seconds) for rank, seconds in enumerate(work)], pace)
            told += [(one.rank, one.step) for one in new]
    return told


@NO_DEADLINE
@given(st.integers(2, 9), works, st.floats(1.6, 50.0), st.data())
def test_a_slow_rank_is_told_of_once_after_several_steps(ranks, work, times, data):
    slower = data.draw(st.integers(0, ranks - 1))
    step = [work * times if rank == slower else work for rank in range(ranks)]
    assert told_of([step] * 30) == [(slower, LOOKS - 1)]


@NO_DEADLINE
@given(st.lists(st.lists(st.floats(1.0, 1.49), min_size=4, max_size=4), min_size=1, max_size=30), works)
def test_ranks_that_keep_pace_are_never_told_of(steps, work):
    assert told_of([[work * factor for factor in step] for step in steps]) == []


@NO_DEADLINE
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(1.6, 50.0)), min_size=1, max_size=10))
def test_outliers_are_never_told_of(outliers):
    """However often, unless as many in a row."""
    steps = [[1.0] * 4]
    for rank, times in outliers:
        steps += [[times if r == rank else 1.0 for r in range(4)]] * (LOOKS - 1) + [[1.0] * 4]
    assert told_of(steps) == []


def test_a_rank_is_told_of_again_only_when_it_has_kept_pace_in_between():
    slower, between, well = [1.0, 1.0, 2.0], [1.0, 1.0, 1.4], [1.0, 1.0, 1.0]
    assert told_of([slower] * 9 + [between] * 30 + [slower] * 9) == [(2, LOOKS - 1)]
    assert told_of([slower] * 9 + [well] * (LOOKS - 1) + [slower] * 9) == [(2, LOOKS - 1)]
    assert told_of([slower] * 9 + [well] * LOOKS + [slower] * 9) == [(2, LOOKS - 1), (2, 9 + LOOKS + LOOKS - 1)]


def test_of_two_ranks_and_of_two_slow_ones_each_is_known():
    assert told_of([[1.0, 2.0]] * 9) == [(1, LOOKS - 1)]
    assert told_of([[2.0, 1.0, 2.0, 1.0]] * 9) == [(0, LOOKS - 1), (2, LOOKS - 1)]


def test_what_a_slow_rank_costs_is_told():
    pace, new = Pace(), []
    for step in range(LOOKS):
        pace, new = slow([status(0, step, 0.2), status(1, step, 0.42), status(2, step, 0.2)], pace)
    (one,) = new
    assert (one.rank, one.times, one.step, one.work, one.median) == (1, 2.1, LOOKS - 1, 0.42, 0.2)


def test_milliseconds_and_ranks_that_tell_nothing_are_not_compared():
    assert told_of([[0.001, 0.009, 0.001]] * 30) == []
    assert told_of([[0.0, 5.0, 0.0]] * 30) == []
    assert told_of([[0.0, 5.0, 1.0]] * 30) == [(1, LOOKS - 1)]


@NO_DEADLINE
@given(st.lists(st.tuples(st.integers(0, 3 * KNOWN), st.floats(0, 1000.0)), min_size=1, max_size=5))
def test_a_learned_limit_lies_within_its_bounds_and_is_that_of_the_longest_silence(seen):
    statuses = [status(rank, 9, 1.0, intervals=count, longest=longest) for rank, (count, longest) in enumerate(seen)]
    learned = limits(statuses, start=600, step=None)
    assert (learned.start, learned.other) == (600, LONGEST)
    if min(count for count, _ in seen) < KNOWN:
        assert learned.step == LONGEST
    else:
        assert learned.step == sorted((SHORTEST, 20 * max(longest for _, longest in seen), LONGEST))[1]
    assert limits(statuses, start=600, step=7.5).step == limits(statuses, start=600, step=7.5).other == 7.5


def test_nothing_is_learned_of_nobody():
    assert limits([], start=600, step=None).step == LONGEST


@pytest.mark.slow
def test_where_steps_are_short_a_hang_is_noticed_after_half_a_minute(tmp_path):
    scene = Scene(tmp_path / "run", {"steps": 200, "step_time": 0.1, "faults": [[100, [[1], 1], "SIGSTOP"]]})
    try:
        failed = scene.event("rank-failed", within=90)
        assert (failed["cause"], failed["rank"]) == ("HANG", 1)
        assert (
            SHORTEST <= float(re.search(r"for ([\d.]+) s in phase step", failed["message"]).group(1)) < SHORTEST + 5
        )  # rounded, as it is told
    finally:
        scene.close()
