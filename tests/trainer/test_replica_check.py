"""A bit flip in one rank's weights is detected before an update or a save uses it, and the rank is named."""

import json
import re
import socket
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import LINEAR, batch, model, optimizer_config, rows
from spmd import spmd

from manta.cluster.supervise.event_log import read_events
from manta.cluster.supervise.failure import Cause, Failure, GiveUp, Restart, decide
from manta.trainer.config.sections import ParallelConfig, TrainConfig
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine import replica_check
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.engine.replica_check import Mismatch, ReplicaError, diagnose, sum_of_bits
from manta.trainer.metrics import read_metrics

HOST = socket.gethostname()
WEIGHT, EXPERT = "blocks.1.mlp.up_proj.weight", "blocks.1.mlp.experts.up_proj"
TYPES = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def build_engine(name, precision, parallel):
    torch.nn.functional.linear = LINEAR
    world = World.from_environment()
    data = world.size // (parallel.tensor * parallel.sequence)
    train = TrainConfig(steps=9, global_batch=4 * data, micro_batch=2)
    mesh = world.mesh(layout_for(train, parallel, world.size))
    return Engine(model(name), mesh=mesh, optimizer=optimizer_config("adamw", precision), precision=precision)


def accumulate(engine, step):
    layout, rank = engine.layout, engine.mesh.data_rank
    return engine.accumulate(
        [rows(batch("gpt2", step), layout.samples_of_rank(first=0, micro_step=micro_step, rank=rank)) for micro_step in range(2)]
    )


def flip(engine, name, bit=3):
    """Flip a bit, like a cosmic ray."""
    weight = dict(engine.module.named_parameters())[name].data
    weight.view(TYPES[weight.dtype]).view(-1)[5] ^= 1 << bit


def check(engine, step):
    """Return the check's error message, or None."""
    with patch.object(replica_check, "DELAY", 0.0):
        try:
            engine.replica_check.run(step)
        except ReplicaError as error:
            return str(error)
    return None


def run_steps(cells, victim, name, late=False):
    """Return each cell's four check results over two steps. In the second step a bit flips on rank `victim`, if any.

    late: it flips after the check of the step's gradients.
    """
    results = []
    for model_name, precision, parallel in cells:
        engine, checks = build_engine(model_name, precision, parallel), []
        for step in (1, 2):
            flips = step == 2 and World.from_environment().rank == victim
            if flips and not late:
                flip(engine, name)
            terms_K = accumulate(engine, step)
            checks.append(check(engine, step))
            if flips and late:
                flip(engine, name)
            engine.update(terms_K, learning_rate=1e-3)
            checks.append(check(engine, step))
        results.append(checks)
    return results


CELLS = [
    ("gpt2", "fp32", ParallelConfig(zero=0)),
    ("gpt2", "fp32", ParallelConfig(zero=1)),
    ("gpt2", "bf16", ParallelConfig(zero=1)),
    ("gpt2", "bf16", ParallelConfig(zero=2)),
]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_flipped_bit_is_detected_before_the_update_and_the_rank_named(ranks):
    """Of three or more ranks one is named, of two both."""
    victim = ranks - 1
    named = f"rank {victim} on {HOST}" if ranks > 2 else f"rank 0 on {HOST} or rank 1 on {HOST}"
    for results in spmd(run_steps, ranks, CELLS, victim, WEIGHT):
        for cell, (*before, detected, after) in zip(CELLS, results, strict=True):
            assert before == [None, None], cell
            assert detected.startswith(f"step 2: {named} holds a corrupt {WEIGHT}: its bits sum to "), cell
            assert (after is None) == (cell[2].zero > 0), cell  # ZeRO gathers the weights again


def test_no_flip_gives_no_report():
    for results in spmd(run_steps, 2, CELLS, None, WEIGHT):
        assert results == [[None] * 4] * len(CELLS)


def test_a_late_flip_persists_without_zero_and_is_overwritten_with_it():
    for without_zero, *with_zero in spmd(run_steps, 2, CELLS, 1, WEIGHT, True):
        assert without_zero[:3] == [None] * 3
        assert f" holds a corrupt {WEIGHT}: " in without_zero[3]
        assert with_zero == [[None] * 4] * (len(CELLS) - 1)


SHARDED = [
    (("moe", "fp32", ParallelConfig(expert=2)), EXPERT, f"rank 1 on {HOST} or rank 3 on {HOST}"),
    (("moe", "bf16", ParallelConfig(expert=2)), "embedding.weight", f"rank 3 on {HOST}"),
    (("gpt2", "fp32", ParallelConfig(tensor=2)), WEIGHT, f"rank 1 on {HOST} or rank 3 on {HOST}"),
    (("gpt2", "bf16", ParallelConfig(sequence=2)), WEIGHT, f"rank 3 on {HOST}"),
]


def run_sharded():
    return [run_steps([cell], 3, name)[0] for cell, name, _ in SHARDED]


@pytest.mark.slow
def test_ranks_with_different_shards_are_not_compared():
    for results in spmd(run_sharded, 4):
        for (cell, name, named), (*before, detected, _) in zip(SHARDED, results, strict=True):
            assert before == [None, None], cell
            assert detected.startswith(f"step 2: {named} holds a corrupt {name}: "), cell


def corrupt_router_bias():
    """Under ZeRO-3 weights have no replicas, but the router's bias has."""
    engine = build_engine("gpt2-moe", "fp32", ParallelConfig(zero=3))
    terms_K = accumulate(engine, 1)
    before = check(engine, 1)
    if World.from_environment().rank == 2:
        next(engine.module.routers())[1].bias[0] += 1
    after = check(engine, 1)
    engine.update(terms_K, learning_rate=1e-3)
    return before, after


def test_router_biases_are_checked_under_every_stage():
    for before, after in spmd(corrupt_router_bias, 3):
        assert before is None
        assert after.startswith(f"step 1: rank 2 on {HOST} holds a corrupt blocks.0.mlp.router.bias: ")


@settings(deadline=None)  # a busy machine may stall a process
@given(st.sampled_from(list(TYPES)), st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=40), st.integers(0, 9), st.data())
def test_the_sum_depends_on_every_bit_and_not_on_the_address(dtype, values, offset, data):
    numbers = torch.tensor(values, dtype=TYPES[dtype])
    copy = torch.cat((torch.zeros(offset, dtype=numbers.dtype), numbers))[offset:]
    assert sum_of_bits(numbers.view(dtype)) == sum_of_bits(copy.view(dtype))
    before = int(sum_of_bits(numbers.view(dtype)))
    bit = data.draw(st.integers(0, numbers.element_size() * 8 - 1))
    numbers[data.draw(st.integers(0, len(values) - 1))] ^= torch.tensor(1 << bit).to(numbers.dtype)
    assert int(sum_of_bits(numbers.view(dtype))) != before


def test_the_sum_of_a_strided_weight_is_that_of_its_elements():
    weight = torch.randn(6, 10)
    assert sum_of_bits(weight.T) == sum_of_bits(weight.T.contiguous())


def reports(*bits, name="w"):
    """Return one report per rank, for copies of a weight with these bits."""
    return [("host", [Mismatch(name=name, bits=own, holders=tuple(range(len(bits))))]) for own in bits]


@settings(deadline=None)  # a busy machine may stall a process
@given(st.integers(3, 9), st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1), st.data())
def test_of_three_or_more_replicas_the_odd_one_is_named(ranks, most, other, data):
    odd = data.draw(st.integers(0, ranks - 1))
    bits = [other if rank == odd else most for rank in range(ranks)]
    if most != other:
        assert diagnose(reports(*bits))[0] == [odd]


@pytest.mark.parametrize("bits", [(1, 2), (1, 1, 2, 2), (1, 2, 3)])
def test_without_a_majority_all_ranks_are_named(bits):
    ranks, message = diagnose(reports(*bits))
    assert ranks == list(range(len(bits)))
    assert ", without a majority. Memory or a processor failed" in message


def test_the_message_names_one_weight_and_at_most_four_ranks():
    two_weights = [(host, [*one, *two]) for (host, one), (_, two) in zip(reports(1, 1, 2), reports(1, 1, 2, name="v"), strict=True)]
    assert diagnose(two_weights)[1].startswith("rank 2 on host holds a corrupt w and 1 other weights: ")
    assert diagnose(reports(*range(9)))[1].startswith(
        "rank 0 on host or rank 1 on host or rank 2 on host or rank 3 on host or 5 more ranks "
    )


def test_only_the_same_corruption_at_the_same_step_ends_the_run():
    first, second = (
        Failure(cause=Cause.EXCEPTION, rank=2, step=7, message=f"ReplicaError: step 8: {diagnose(reports(1, 1, bits))[1]}")
        for bits in (2, 3)
    )
    assert isinstance(decide([first], max_restarts_without_progress=3), Restart)
    assert isinstance(decide([first, second], max_restarts_without_progress=3), Restart)
    assert isinstance(decide([first, first], max_restarts_without_progress=3), GiveUp)


FLIPPING = """
import os
from pathlib import Path

import torch

from manta.trainer.model.llama import Llama


class Flipping(Llama):
    passes = 0

    def forward(self, batch, divisors_K):
        self.passes += self.training
        marker, weight = Path(self.config.options["marker"]), self.blocks[1].mlp.up_proj.weight.data
        if self.training and self.passes == 9 and os.environ["RANK"] == "1" and not marker.exists():
            marker.touch()
            weight.view({2: torch.int16, 4: torch.int32}[weight.element_size()]).view(-1)[7] ^= 1 << 4
        return super().forward(batch, divisors_K)
"""
SIZES = {"layers": 2, "width": 64, "heads": 4, "mlp_width": 128}


@dataclass(frozen=True)
class CorruptedRun:
    """A run of 15 steps. In step 9 a bit flips on rank 1, unless `intact` is set. It saves at steps 6 and 12."""

    losses: list[float]
    failures: list[dict]
    resumed: list[str]  # checkpoints

    @classmethod
    def run(cls, workspace, name, *settings, intact=False):
        (workspace.directory / "flipping.py").write_text(FLIPPING)
        marker, directory = workspace.directory / f"{name}.marker", workspace.directory / name
        if intact:
            marker.touch()
        model = json.dumps({"family": "flipping:Flipping", "options": {"marker": str(marker)}, **SIZES})
        workspace.train(name, f"model={model}", "train.steps=15", "train.global_batch=12", "cluster.ranks_per_node=3", *settings)
        assert marker.exists(), "no bit was flipped"
        logs = "".join(log.read_text() for log in sorted(directory.glob("logs/*/rank-0000.log")))
        return cls(
            [line["train/loss"] for line in read_metrics(directory / "metrics.jsonl")],
            [event for event in read_events(directory / "events.jsonl") if event["event"] == "rank-failed"],
            re.findall(r"resumed from .*(step-\d+)", logs),
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "zero", "every", "detected"),
    [("bf16", 1, 1, 9), ("fp32", 0, 1000, 12), ("bf16", 2, 3, 9)],
    ids=["checked in each step", "checked before a save", "checked in every third step"],
)
def test_a_run_recovers_from_one_corruption_with_the_same_losses(workspace, precision, zero, every, detected):
    settings = [f"parallel.zero={zero}", f"precision={precision}", f"guard.replica_check_every_steps={every}"]
    intact = CorruptedRun.run(workspace, f"intact {every}", *settings, intact=True)
    assert (intact.failures, intact.resumed) == ([], [])
    corrupted = CorruptedRun.run(workspace, f"corrupted {every}", *settings)
    (failure,) = corrupted.failures
    message = f"ReplicaError: step {detected}: rank 1 on {HOST} holds a corrupt blocks.1.mlp.up_proj.weight: its bits sum to "
    assert failure["message"].startswith(message)
    assert (failure["rank"], failure["cause"]) == (1, "EXCEPTION")
    assert corrupted.resumed == ["step-00000006"]
    assert len(corrupted.losses) == 15
    assert corrupted.losses == intact.losses  # bitwise


@pytest.mark.slow
def test_without_checks_a_corruption_is_learned_and_saved(workspace):
    settings = ["parallel.zero=0", "precision=fp32", "guard.replica_check_every_steps=0"]
    intact, corrupted = (CorruptedRun.run(workspace, f"unchecked {intact}", *settings, intact=intact) for intact in (True, False))
    assert intact.failures == corrupted.failures == []
    assert corrupted.losses[:8] == intact.losses[:8]
    assert corrupted.losses[8:] != intact.losses[8:]
