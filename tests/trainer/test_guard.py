"""The guard against loss spikes: which steps it finds, and that a skipped update leaves no trace."""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import ACCUMULATION, GLOBAL_BATCH, LINEAR, OPTIMIZERS, Cell, batch, gather_masters, model, optimizer_config, rows
from spmd import spmd

from manta.cluster.supervise.failure import Cause, Failure, GiveUp, Restart, decide, failing_machines
from manta.data.config import DataConfig
from manta.data.sampling.samples import sample_numbers
from manta.launch.run.resume_check import spans_before
from manta.trainer.config.sections import GuardConfig, ParallelConfig, TrainConfig
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.guard.detection import Measured, SpikeDetector
from manta.trainer.guard.record import rolled_back
from manta.trainer.guard.response import ranges
from manta.trainer.health import Health

CELLS = [
    *(Cell("gpt2", 2, parallel=ParallelConfig(zero=zero)) for zero in (0, 2, 3)),
    Cell("llama", 2, parallel=ParallelConfig(tensor=2)),
]
MORE_CELLS = [
    Cell("gpt2", 2, parallel=ParallelConfig(zero=1)),
    Cell("llama", 2, "bf16", ParallelConfig(zero=2)),
    Cell("llama", 2, "bf16", ParallelConfig(zero=3)),
    Cell("llama", 2, "fp16", ParallelConfig(zero=1)),
    Cell("bert", 2, parallel=ParallelConfig(sequence=2)),
    Cell("gpt2-moe", 2, parallel=ParallelConfig(expert=2)),
    Cell("gpt2", 2, parallel=ParallelConfig(zero=1, offload=True)),
    Cell("gpt2", 2, parallel=ParallelConfig(zero=3, offload=True)),
]


def trained(cell, optimizer, steps, rejected=()):
    """Return the masters, the biases of routers, and the gradient norms after these steps."""
    torch.nn.functional.linear = LINEAR
    world = World.from_environment()
    data = world.size // (cell.parallel.tensor * cell.parallel.sequence)
    train = TrainConfig(steps=9, global_batch=GLOBAL_BATCH, micro_batch=GLOBAL_BATCH // (ACCUMULATION * data))
    layout = layout_for(train, cell.parallel, world.size)
    mesh = world.mesh(layout)
    engine = Engine(model(cell.model), mesh=mesh, optimizer=optimizer_config(optimizer, cell.precision), precision=cell.precision)
    norms = []
    for step in steps:
        numbers = [layout.samples_of_rank(first=0, micro_step=micro, rank=mesh.data_rank) for micro in range(ACCUMULATION)]
        terms_K = engine.accumulate([rows(batch(cell.model, step), one) for one in numbers])
        seen = []

        def rejects(norm, step=step, seen=seen):
            seen.append(norm)
            return step in rejected

        with (health := Health(engine)).measure_update():
            result = engine.update(terms_K, learning_rate=1e-3, rejects=rejects)
        assert any(key.startswith("health/grad_norm/") for key in health.line(result.grad_norm, 1.0)) is not result.rejected
        assert (seen, result.rejected) == ([result.grad_norm], step in rejected), "asked once, with the norm"
        if step not in rejected:
            norms.append(result.grad_norm)
    weights, drifted = gather_masters(engine)
    assert not drifted
    biases = {name: router.bias.clone() for name, router in engine.module.routers() if router.bias is not None}
    return {name: weight.numpy() for name, weight in (weights | biases).items()}, norms


def compare(cells, optimizer):
    results = []
    for cell in cells:
        without, norms = trained(cell, optimizer, (0, 1, 3, 4))
        skipped, skipped_norms = trained(cell, optimizer, (0, 1, 2, 3, 4), rejected={2})
        all_steps, _ = trained(cell, optimizer, (0, 1, 2, 3, 4))
        same = norms == skipped_norms and all(np.array_equal(weight, skipped[name]) for name, weight in without.items())
        results.append((same, any(not np.array_equal(weight, all_steps[name]) for name, weight in without.items())))
    return results


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cells", [CELLS, pytest.param(MORE_CELLS, marks=pytest.mark.slow)])
def test_a_skipped_update_leaves_no_trace_under_any_layout(cells, optimizer):
    for results in spmd(compare, 2, cells, optimizer):
        assert {str(cell): result for cell, result in zip(cells, results, strict=True)} == {str(cell): (True, True) for cell in cells}


def norm_of_nan(cells):
    norms = []
    for cell in cells:
        world = World.from_environment()
        torch.nn.functional.linear = LINEAR
        mesh = world.mesh(layout_for(TrainConfig(steps=1, global_batch=8, micro_batch=2), cell.parallel, world.size))
        engine = Engine(model(cell.model), mesh=mesh, optimizer=optimizer_config("adamw", cell.precision), precision=cell.precision)
        terms_K = engine.accumulate([rows(batch(cell.model, 0), [2 * mesh.data_rank, 2 * mesh.data_rank + 1])])
        weight = next(iter(engine.module.parameters()))
        if mesh.data_rank == 0 or cell.parallel.zero == 0:  # each rank has all gradients without ZeRO
            for part in _gradients(engine, weight):
                part.view(-1)[0] = math.nan
        result = engine.update(terms_K, learning_rate=1e-3, rejects=lambda norm: not math.isfinite(norm))
        finite = all(torch.isfinite(master).all() for master in gather_masters(engine)[0].values())
        biases = [router.bias for _, router in engine.module.routers()]
        assert not any(bias.any() for bias in biases), "a rejected update moves no router's bias"
        norms.append((math.isfinite(result.grad_norm), finite, result.rejected))
    return norms


def _gradients(engine, weight):
    """Return this rank's gradients as DeepSpeed keeps them before the step."""
    zero = engine.zero_optimizer
    if engine.layout.zero == 0:
        return [weight.grad]
    if engine.layout.zero == 3:
        return [zero.averaged_gradients[0][0]]
    return [next(part for parts in zero.averaged_gradients.values() for part in parts or [])]


def test_a_gradient_that_is_not_finite_is_found_and_changes_no_weight():
    cells = [
        *(Cell("gpt2-moe", 2, parallel=ParallelConfig(zero=zero)) for zero in (0, 1, 2, 3)),
        *(Cell("gpt2-moe", 2, "bf16", ParallelConfig(zero=zero)) for zero in (1, 2, 3)),
    ]
    for results in spmd(norm_of_nan, 2, cells):
        assert {str(cell): result for cell, result in zip(cells, results, strict=True)} == {
            str(cell): (False, True, True) for cell in cells
        }


STEPS = st.lists(st.tuples(st.floats(0.1, 20), st.floats(0.01, 50)), min_size=2, max_size=60)


@settings(deadline=None)
@given(steps=STEPS, size=st.integers(2, 40), deviations=st.floats(0.5, 8))
def test_limits_are_the_mean_and_some_standard_deviations_of_the_window(steps, size, deviations):
    detector, window = SpikeDetector(GuardConfig(spike_window=size, spike_deviations=deviations)), []
    for step in steps:
        kept = window[-size:]
        limits = [math.inf, math.inf]
        if len(kept) >= max(2, size // 2):
            limits = [statistics.fmean(values) + deviations * statistics.stdev(values) for values in zip(*kept, strict=True)]
        assert detector.limits() == pytest.approx(limits)
        expected = any(value > limit for value, limit in zip(step, detector.limits(), strict=True))
        assert detector.kind(Measured(*step)) == ("spike" if expected else None)
        window.append([min(value, limit) for value, limit in zip(step, detector.limits(), strict=True)])
        detector.add(Measured(*step))
    restored = SpikeDetector(GuardConfig(spike_window=size, spike_deviations=deviations), [list(pair) for pair in detector.window])
    assert restored.limits() == detector.limits()


@pytest.mark.parametrize("step", [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_a_value_that_is_not_finite_is_found_at_once_and_enters_no_window(step):
    detector = SpikeDetector(GuardConfig())
    assert detector.kind(Measured(*step)) == "not-finite"
    detector.add(Measured(*step))
    assert not detector.window


def test_one_spike_hides_no_later_one_and_a_lasting_change_is_followed():
    detector = SpikeDetector(GuardConfig(spike_window=32))
    for step in range(32):
        detector.add(Measured(3.0 + 0.01 * (step % 3), 1.0 + 0.01 * (step % 3)))
    for _ in range(3):
        assert detector.kind(Measured(100.0, 1.0)) == "spike"
        detector.add(Measured(100.0, 1.0))
    found = 0
    while detector.kind(Measured(5.0, 1.0)):
        detector.add(Measured(5.0, 1.0))
        found += 1
    assert 0 < found < 32


@given(
    skip=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=4),
    more=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=4),
)
def test_samples_that_are_skipped_also_are_none_of_those_that_are_read(skip, more):
    spans, end = [], 0
    for gap, length in skip:
        spans.append((end + gap, end + gap + length))
        end = spans[-1][1]
    data = DataConfig(sources=["x"], sequence_length=8, skip=spans)
    also = [(first, first + length) for first, length in more]
    both = data.skip_also(also)
    excluded = {number for span in (*spans, *also) for number in range(*span)}
    expected = [number for number in range(400) if number not in excluded][:100]
    assert sample_numbers(both.skip, np.arange(100)).tolist() == expected
    assert DataConfig.model_validate(both.model_dump()).skip_also(also) == both, "valid, and the same if repeated"
    assert all(sample_numbers(both.skip, np.arange(100))[np.arange(100)] >= 0)


def test_what_is_skipped_is_compared_by_sample_and_not_by_range():
    def before(*skip):
        return spans_before(108, DataConfig(sources=["x"], sequence_length=8, skip=skip))

    assert before((100, 108)) == before((100, 120)) == before((100, 104), (104, 108), (110, 111))
    assert before((100, 108)) != before((100, 107)), "the control: 107 has been read"


def test_numbers_as_ranges():
    assert ranges(np.array([3, 4, 5, 9, 11, 12])) == ((3, 6), (9, 10), (11, 13))
    assert rolled_back([]) == ()


def test_going_back_counts_as_no_failure():
    spikes = [Failure(cause=Cause.SPIKE, rank=0, step=7, message="same", machine="a") for _ in range(9)]
    assert decide(spikes, max_restarts_without_progress=0) == Restart(after=0.0)
    assert failing_machines(spikes) == set()
    error = Failure(cause=Cause.EXCEPTION, rank=0, step=7, message="same", machine="a")
    assert isinstance(decide([error, *spikes, error], max_restarts_without_progress=5), GiveUp), "the control: the same exception twice"
