"""What ended an attempt, and what follows: pure functions."""

import signal
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.cluster.nodes.report import RankStatus
from manta.cluster.protocol import RankError
from manta.cluster.supervise.failure import (
    Cause,
    Failure,
    GiveUp,
    Restart,
    decide,
    failing_machines,
    failure_of,
    first_failure,
)
from manta.cluster.supervise.hangs import HangLimits, detect_hang

LIMITS = HangLimits(start=100, step=3, other=20)
RETRIED = st.sampled_from([Cause.SIGNAL, Cause.HANG, Cause.NODE_LOST])


def failure(cause=Cause.SIGNAL, step=0, message="killed by SIGKILL", rank=0):
    return Failure(cause=cause, rank=rank, step=step, message=message)


def decided(history):
    return decide(history, max_restarts_without_progress=3)


def status(rank=0, code=None, at=0.0, **more):
    fields = {"pid": 1, "step": 5, "phase": "step", "silent_seconds": 0.0, "has_stepped": True, **more}
    return RankStatus(rank=rank, code=code, exited_at=at, **fields)


failures = st.builds(failure, cause=RETRIED, step=st.integers(0, 5), message=st.sampled_from(["one", "two"]), rank=st.integers(0, 3))


@given(st.lists(failures, min_size=1), st.integers(0, 5))
def test_a_run_without_progress_gives_up(history, allowed):
    stuck = [*history, *[failure(step=0)] * (allowed + 1)]
    assert isinstance(decide(stuck, max_restarts_without_progress=allowed), GiveUp)


@given(st.lists(failures))
def test_progress_resets_the_count_and_restarts_at_once(history):
    further = failure(step=max((f.step for f in history), default=0) + 1)
    assert decided([*history, further]) == Restart(after=0.0)


@given(st.integers(1, 30))
def test_the_backoff_doubles_up_to_a_bound(count):
    decision = decide([failure()] * count, max_restarts_without_progress=100)
    assert decision == Restart(after=0.0 if count == 1 else min(60.0, 2.0 ** (count - 2)))


@given(st.lists(failures, min_size=1), st.integers(1, 5))
def test_preemptions_do_not_count(history, count):
    preempted = [failure(Cause.PREEMPTED)] * count
    assert decided([*history, *preempted]) == Restart(after=0.0)
    assert decided([*preempted, *history]) == decided(history)


@given(st.lists(failures))
def test_failures_that_the_user_must_fix_are_never_retried(history):
    assert decided([*history, failure(Cause.INPUT, message="no such file")]) == GiveUp(reason="no such file", exit_code=2)
    assert decided([*history, failure(Cause.UNRECOVERABLE, message="no")]) == GiveUp(reason="no", exit_code=1)
    assert isinstance(decided([*history, failure(Cause.OUT_OF_MEMORY)]), GiveUp)


def test_the_same_exception_twice_in_a_row_at_one_step_gives_up():
    raised = failure(Cause.EXCEPTION, step=7, message="ValueError: x")
    assert isinstance(decided([raised]), Restart)
    assert isinstance(decided([raised, failure(Cause.PREEMPTED), raised]), GiveUp)
    assert isinstance(decided([raised, failure(Cause.EXCEPTION, step=7, message="ValueError: y")]), Restart)
    assert isinstance(decided([failure(Cause.EXCEPTION, step=6, message="ValueError: x"), raised]), Restart)


def test_machines_with_two_failures_without_progress_are_failing():
    on = [replace(failure(step=step), machine=name) for step, name in ((5, "a"), (5, "b"), (4, "b"), (5, ""), (5, ""))]
    assert failing_machines(on) == {"b"}
    assert failing_machines([*on, replace(failure(step=6), machine="a")]) == set()


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8, unique=True))
def test_the_first_rank_to_exit_is_the_cause(times):
    exited = [status(rank=rank, code=1, at=at) for rank, at in enumerate(times)]
    assert first_failure(exited).exited_at == min(times)


@given(st.permutations([status(0, 1, 1.0), status(1, -signal.SIGABRT, 1.1), status(2, -signal.SIGSEGV, 1.2), status(3, 1, 0.9)]))
def test_a_signal_outranks_an_exception_but_an_abort_does_not(exited):
    assert first_failure(exited).rank == 2
    assert first_failure([status for status in exited if status.rank != 2]).rank == 3


def test_a_rank_that_lost_its_peer_is_not_the_cause():
    peer_error = RankError(type="RuntimeError", message="gloo/transport/tcp/pair.cc: Read error: Connection reset by peer.")
    exited = [status(0, 1, 1.0, error=peer_error), status(1, -signal.SIGABRT, 1.1), status(2, 1, 1.2)]
    assert [first_failure(exited[first:]).rank for first in range(3)] == [1, 1, 2]
    assert first_failure(exited[:1]).rank == 0


def test_a_hung_rank_is_named():
    fine = status(0, silent_seconds=1.0, step=6)
    message = "rank 1 sent no heartbeat for 4.0 s in phase step"
    assert detect_hang([fine, status(1, silent_seconds=2.0)], LIMITS) is None
    assert detect_hang([fine, status(1, silent_seconds=4.0)], LIMITS) == failure(Cause.HANG, 5, message, 1)
    assert detect_hang([fine, status(1, silent_seconds=400, code=0)], LIMITS) is None


@pytest.mark.parametrize(("phase", "limit"), [("compile", 100), ("save", 100), ("evaluate", 20), ("read", 20), ("done", 20), ("step", 3)])
def test_each_phase_has_its_limit_and_the_first_step_that_of_start(phase, limit):
    assert detect_hang([status(1, silent_seconds=limit - 1, phase=phase)], LIMITS) is None
    assert detect_hang([status(1, silent_seconds=limit + 1, phase=phase)], LIMITS).rank == 1
    assert detect_hang([status(1, silent_seconds=99, phase=phase, has_stepped=False)], LIMITS) is None
    assert detect_hang([status(1, silent_seconds=101, phase=phase, has_stepped=False)], LIMITS).rank == 1


@pytest.mark.parametrize(("phase", "limit"), [("read", 20), ("compile", 100)])
def test_ranks_wait_for_one_that_reads_or_compiles(phase, limit):
    waiting = status(0, silent_seconds=limit + 1)
    assert detect_hang([replace(waiting, silent_seconds=limit - 1), status(1, silent_seconds=limit - 1.5, phase=phase)], LIMITS) is None
    assert detect_hang([waiting, status(1, silent_seconds=limit + 0.5, phase=phase)], LIMITS).rank == 1
    assert detect_hang([replace(waiting, silent_seconds=4), status(1, phase="save")], LIMITS).rank == 0


def test_a_hang_names_the_stopped_rank_then_the_last_then_the_quietest():
    waiting, behind, stopped = (
        status(0, silent_seconds=9, step=6),
        status(1, silent_seconds=8, step=5),
        status(2, silent_seconds=7, step=6, state="T"),
    )
    assert detect_hang([waiting, behind, stopped], LIMITS).rank == stopped.rank
    assert detect_hang([waiting, behind], LIMITS).rank == behind.rank
    assert detect_hang([waiting, status(3, silent_seconds=8, step=6)], LIMITS).rank == waiting.rank


def test_of_ranks_at_one_step_the_one_in_no_collective_is_named():
    statuses = [status(0, silent_seconds=9), status(1, silent_seconds=8)]
    named = detect_hang(statuses, LIMITS, waiting={0})
    assert named.rank == 1
    assert named.message == "rank 1 sent no heartbeat for 8.0 s in phase step, while others wait for it in a collective"
    assert detect_hang(statuses, LIMITS, waiting={0, 1}) == detect_hang(statuses, LIMITS)
    assert detect_hang([*statuses, status(2, silent_seconds=7, step=4)], LIMITS, waiting={0, 2}).rank == 2
    assert detect_hang([*statuses, status(2, silent_seconds=7, state="T")], LIMITS, waiting={0}).message.endswith("its process is stopped")


def test_ranks_that_never_sent_a_heartbeat_are_listed():
    absent = [status(rank, silent_seconds=700, step=0, phase="") for rank in (1, 3)]
    failed = detect_hang([status(0, silent_seconds=600, phase="start", step=0), *absent], LIMITS._replace(start=650))
    assert failed.message == "no heartbeat for 700.0 s from rank 1, 3"


def test_an_exit_is_explained_by_signal_error_file_or_output():
    error = RankError(type="ValueError", message="bad", category="out_of_memory")
    assert failure_of(status(2, -signal.SIGSEGV)) == failure(Cause.SIGNAL, 5, "killed by SIGSEGV", 2)
    assert failure_of(status(2, 1, error=error)) == failure(Cause.OUT_OF_MEMORY, 5, "ValueError: bad", 2)
    by_kernel = replace(error, type="SIGKILL")
    assert failure_of(status(2, -signal.SIGKILL, error=by_kernel)) == failure(Cause.OUT_OF_MEMORY, 5, "SIGKILL: bad", 2)
    assert failure_of(status(2, -signal.SIGKILL, error=replace(error, category="exception"))).cause is Cause.SIGNAL
    assert failure_of(status(2, 3, tail="a\nb\n")) == failure(Cause.EXCEPTION, 5, "exit code 3: b", 2)
    assert failure_of(status(2, 3)) == failure(Cause.EXCEPTION, 5, "exit code 3: no output", 2)
