"""Compute time tells a straggler from the ranks that wait for it, under every layout."""

import os
import signal
import time

import pytest
import torch
from parity import GLOBAL_BATCH, MODELS, batch, model, optimizer_config, rows
from run_process import RunProcess, exact_values
from spmd import spmd

from manta.trainer.config.sections import ParallelConfig, TrainConfig
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine

LAYOUTS = [
    ("gpt2", ParallelConfig(zero=1)),
    ("gpt2", ParallelConfig(zero=3)),
    ("gpt2", ParallelConfig(tensor=2)),
    ("gpt2", ParallelConfig(sequence=2, zero=3)),
    ("moe", ParallelConfig(expert=2)),
]
PAUSE, STEPS = 0.02, 3


def step_times(layouts):
    """For each layout, return this rank's compute time and step time in seconds, the minimum of several steps. Rank 1 is slow."""
    world, times = World.from_environment(), []
    torch.nn.functional.linear = torch._C._nn.linear  # ZeRO-3 leaves its replacement in place
    for name, parallel in layouts:
        data = world.size // (parallel.tensor * parallel.sequence)
        layout = layout_for(
            TrainConfig(steps=STEPS, global_batch=GLOBAL_BATCH, micro_batch=GLOBAL_BATCH // (2 * data)), parallel, world.size
        )
        mesh = world.mesh(layout)
        engine = Engine(model(name), mesh=mesh, optimizer=optimizer_config("adamw"), precision="fp32")
        if world.rank == 1:
            for block in engine.module.blocks:
                block.attention.q_proj.forward = slowed(block.attention.q_proj.forward)
        seconds = []
        for step in range(STEPS):
            start = time.perf_counter()
            batches = [
                rows(batch(name, step), layout.samples_of_rank(first=0, micro_step=micro_step, rank=mesh.data_rank))
                for micro_step in range(2)
            ]
            engine.step(batches, learning_rate=1e-3)
            seconds.append((engine.compute_timer.take_seconds(), time.perf_counter() - start))
        times.append([min(values) for values in zip(*seconds, strict=True)])
    return times


def slowed(forward):
    def slow(*inputs):
        time.sleep(PAUSE)
        return forward(*inputs)

    return slow


@pytest.mark.slow
def test_only_a_stragglers_compute_time_grows_though_all_steps_are_slow():
    pauses = PAUSE * 2 * MODELS["gpt2"].layers
    for (name, parallel), (waiting, step), (slow, _) in zip(LAYOUTS, *spmd(step_times, 2, LAYOUTS), strict=True):
        assert step >= pauses <= slow, (name, parallel)
        assert 0 < waiting < pauses, (name, parallel)


@pytest.mark.slow
def test_a_straggler_is_reported_and_losses_stay_the_same(workspace):
    """The rank is stopped most of the time, in bursts too short to count as a hang."""
    larger = ["model.width=128", "train.global_batch=32", "train.steps=10000"]
    with RunProcess(workspace, "slowed", *larger) as run:
        run.event("first-step")
        victim = run.pids(1)[1]
        until = time.monotonic() + 120
        while not run.events("rank-slow") and time.monotonic() < until:
            os.kill(victim, signal.SIGSTOP)
            time.sleep(0.1)
            os.kill(victim, signal.SIGCONT)
            time.sleep(0.01)
        run.process.send_signal(signal.SIGTERM)
        code, output = run.end()
        assert code == 75, output
        (slow,) = run.events("rank-slow")
        assert slow["rank"] == 1
        assert slow["ratio"] > 1.5
        assert f"rank 1 on {slow['node']} is {slow['ratio']:.1f}x slower than the median" in output
        assert not run.events("rank-failed")
    slowed = exact_values(run.lines())
    with RunProcess(workspace, "not slowed", *larger) as other:
        other.steps(1, len(slowed))
        other.process.send_signal(signal.SIGTERM)
        assert other.end()[0] == 75
    assert exact_values(other.lines())[: len(slowed)] == slowed
