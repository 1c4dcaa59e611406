"""A straggler is reported, once; and how long a step may take is learned."""

import re
from dataclasses import replace

import pytest
from fake_run import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.cluster.machine import Machine
from manta.cluster.nodes.placement import NodeAllocation
from manta.cluster.nodes.report import RankStatus
from manta.cluster.supervise.attempt import is_one_machine_without_gpus
from manta.cluster.supervise.hangs import MAX_STEP_LIMIT, MIN_INTERVALS, MIN_STEP_LIMIT, hang_limits
from manta.cluster.supervise.stragglers import CHECKS, LASTING, WorkHistory, find_stragglers

works = st.floats(0.05, 100.0)


def status(rank, step, work, **more):
    fields = {"pid": 1, "phase": "step", "silent_seconds": 0.0, "has_stepped": True, **more}
    return RankStatus(rank=rank, step=step, work=work, **fields)


NO_DEADLINE = settings(deadline=None)  # on a busy machine a process may wait for long


def reported(steps):
    """Return (rank, step) of each report. steps: the work of each rank, step by step."""
    history, reports = WorkHistory(), []
    for step, work in enumerate(steps):
        for _ in range(2):  # checks are more frequent than steps
            history, new = find_stragglers([status(rank, step, seconds) for rank, seconds in enumerate(work)], history)
            reports += [(straggler.rank, straggler.step) for straggler in new]
    return reports


@NO_DEADLINE
@given(st.integers(2, 9), works, st.floats(1.6, 50.0), st.data())
def test_a_straggler_is_reported_once_after_several_steps(ranks, work, times, data):
    slower = data.draw(st.integers(0, ranks - 1))
    step = [work * times if rank == slower else work for rank in range(ranks)]
    assert reported([step] * 30) == [(slower, CHECKS - 1)]


@NO_DEADLINE
@given(st.lists(st.lists(st.floats(1.0, 1.49), min_size=4, max_size=4), min_size=1, max_size=30), works)
def test_ranks_of_similar_speed_are_never_reported(steps, work):
    assert reported([[work * factor for factor in step] for step in steps]) == []


@NO_DEADLINE
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(1.6, 50.0)), min_size=1, max_size=10))
def test_outliers_are_never_reported(outliers):
    """However many there are, unless enough are consecutive."""
    steps = [[1.0] * 4]
    for rank, times in outliers:
        steps += [[times if r == rank else 1.0 for r in range(4)]] * (CHECKS - 1) + [[1.0] * 4]
    assert reported(steps) == []


def test_a_straggler_is_reported_again_only_after_it_recovered():
    slow, between, recovered = [1.0, 1.0, 2.0], [1.0, 1.0, 1.4], [1.0, 1.0, 1.0]
    assert reported([slow] * 9 + [between] * 30 + [slow] * 9) == [(2, CHECKS - 1)]
    assert reported([slow] * 9 + [recovered] * (CHECKS - 1) + [slow] * 9) == [(2, CHECKS - 1)]
    assert reported([slow] * 9 + [recovered] * CHECKS + [slow] * 9) == [(2, CHECKS - 1), (2, 9 + CHECKS + CHECKS - 1)]


def reported_after(steps, *, lasting):
    """Return the seconds after which rank 1 is reported, if a step takes one. steps: whether it is slow."""
    history = WorkHistory()
    for second, is_slow in enumerate(steps):
        statuses = [status(0, second, 1.0), status(1, second, 2.0 if is_slow else 1.0)]
        history, new = find_stragglers(statuses, history, now=float(second), lasting=lasting)
        if new:
            return second
    return None


def test_where_other_programs_run_a_rank_is_reported_only_if_it_stays_slow():
    assert reported_after([True] * 100, lasting=LASTING) == LASTING
    assert reported_after([False] * 20 + [True] * 100, lasting=LASTING) == 22 + LASTING, "the median of five checks"
    assert reported_after(([True] * 29 + [False] * 3) * 20, lasting=LASTING) is None
    assert reported_after(([True] * 9 + [False]) * 20, lasting=LASTING) == LASTING + 4, "a single check does not hide that it is slow"


def test_one_machine_without_gpus_is_told_from_others(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    one, other = (Machine(id=host, host=host, address="127.0.0.1", port=1, cpus=2) for host in ("laptop", "other"))
    assert is_one_machine_without_gpus([NodeAllocation(one, 2), NodeAllocation(one, 2)])
    assert not is_one_machine_without_gpus([NodeAllocation(one, 2), NodeAllocation(other, 2)])
    assert not is_one_machine_without_gpus([NodeAllocation(replace(one, gpus=2), 2)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert not is_one_machine_without_gpus([NodeAllocation(one, 2)])


def test_one_of_two_ranks_and_two_of_four_are_found():
    assert reported([[1.0, 2.0]] * 9) == [(1, CHECKS - 1)]
    assert reported([[2.0, 1.0, 2.0, 1.0]] * 9) == [(0, CHECKS - 1), (2, CHECKS - 1)]


def test_a_report_has_the_work_and_the_median():
    history, new = WorkHistory(), []
    for step in range(CHECKS):
        history, new = find_stragglers([status(0, step, 0.2), status(1, step, 0.42), status(2, step, 0.2)], history)
    (straggler,) = new
    assert (straggler.rank, straggler.ratio, straggler.step) == (1, 2.1, CHECKS - 1)
    assert (straggler.work, straggler.median) == (0.42, 0.2)


def test_small_differences_and_unknown_work_are_ignored():
    assert reported([[0.001, 0.009, 0.001]] * 30) == []
    assert reported([[0.0, 5.0, 0.0]] * 30) == []
    assert reported([[0.0, 5.0, 1.0]] * 30) == [(1, CHECKS - 1)]


@NO_DEADLINE
@given(st.lists(st.tuples(st.integers(0, 3 * MIN_INTERVALS), st.floats(0, 1000.0)), min_size=1, max_size=5))
def test_a_learned_limit_follows_the_longest_interval_within_bounds(measured):
    statuses = [status(rank, 9, 1.0, intervals=count, longest=longest) for rank, (count, longest) in enumerate(measured)]
    limits = hang_limits(statuses, start=600, step=None)
    assert (limits.start, limits.other) == (600, MAX_STEP_LIMIT)
    if min(count for count, _ in measured) < MIN_INTERVALS:
        assert limits.step == MAX_STEP_LIMIT
    else:
        assert limits.step == sorted((MIN_STEP_LIMIT, 20 * max(longest for _, longest in measured), MAX_STEP_LIMIT))[1]
    fixed = hang_limits(statuses, start=600, step=7.5)
    assert fixed.step == fixed.other == 7.5


def test_nothing_is_learned_without_ranks():
    assert hang_limits([], start=600, step=None).step == MAX_STEP_LIMIT


@pytest.mark.slow
def test_a_hang_in_short_steps_is_detected_after_half_a_minute(tmp_path):
    run = FakeRun(tmp_path / "run", {"steps": 200, "step_time": 0.1, "faults": [[100, [[1], 1], "SIGSTOP"]]})
    try:
        failed = run.event("rank-failed", within=90)
        assert (failed["cause"], failed["rank"]) == ("HANG", 1)
        seconds = float(re.search(r"for ([\d.]+) s in phase step", failed["message"]).group(1))  # rounded in the message
        assert MIN_STEP_LIMIT <= seconds < MIN_STEP_LIMIT + 5
    finally:
        run.close()
