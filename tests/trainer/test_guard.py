"""A bit that flips in one rank's weights is noticed before it is learned from or saved, and the rank is named."""

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
from manta.cluster.supervise.failure import Cause, Failure, GiveUp, Restart, RestartPolicy, decide
from manta.trainer.config.training import ParallelConfig, TrainConfig
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine import replica_check
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.engine.replica_check import Holding, ReplicaError, sum_of_bits, verdict
from manta.trainer.metrics import read_metrics

HOST = socket.gethostname()
WEIGHT, EXPERT = "blocks.1.mlp.up_proj.weight", "blocks.1.mlp.experts.up_proj"
TYPES = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def built(name, precision, parallel):
    torch.nn.functional.linear = LINEAR
    world = World.from_environment()
    data = world.size // (parallel.tensor * parallel.sequence)
    train = TrainConfig(steps=9, global_batch=4 * data, micro_batch=2)
    mesh = world.mesh(layout_for(train, parallel, world.size))
    return Engine(model(name), mesh=mesh, optimizer=optimizer_config("adamw", precision), precision=precision)


def gradients(engine, step):
    layout, rank = engine.layout, engine.mesh.data_rank
    return engine.accumulate([rows(batch("gpt2", step), layout.samples(first=0, turn=turn, rank=rank)) for turn in range(2)])


def flip(engine, name, bit=3):
    """As a cosmic ray would: nobody is told."""
    weight = dict(engine.module.named_parameters())[name].data
    weight.view(TYPES[weight.dtype]).view(-1)[5] ^= 1 << bit


def seen(engine, step):
    with patch.object(replica_check, "WAIT", 0.0):
        try:
            engine.replicas.look(step)
        except ReplicaError as error:
            return str(error)
    return None


def steps(cells, victim, name, late=False):
    """Of each cell what is seen at the end of four looks, two steps long; a bit flips on one rank in the second step, if any.

    late: once the step's gradients have been looked at.
    """
    told = []
    for model_name, precision, parallel in cells:
        engine, looks = built(model_name, precision, parallel), []
        for step in (1, 2):
            flips = step == 2 and World.from_environment().rank == victim
            if flips and not late:
                flip(engine, name)
            terms_K = gradients(engine, step)
            looks.append(seen(engine, step))
            if flips and late:
                flip(engine, name)
            engine.update(terms_K, learning_rate=1e-3)
            looks.append(seen(engine, step))
        told.append(looks)
    return told


CELLS = [
    ("gpt2", "fp32", ParallelConfig(zero=0)),
    ("gpt2", "fp32", ParallelConfig(zero=1)),
    ("gpt2", "bf16", ParallelConfig(zero=1)),
    ("gpt2", "bf16", ParallelConfig(zero=2)),
]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_flipped_bit_is_noticed_before_its_gradients_are_used_and_the_rank_is_named(ranks):
    """By more than two of them by itself."""
    victim = ranks - 1
    named = f"rank {victim} on {HOST}" if ranks > 2 else f"rank 0 on {HOST} or rank 1 on {HOST}"
    for looks in spmd(steps, ranks, CELLS, victim, WEIGHT):
        for cell, (*before, noticed, after) in zip(CELLS, looks, strict=True):
            assert before == [None, None], cell
            assert noticed.startswith(f"step 2: {named} holds a changed {WEIGHT}: its bits sum to "), cell
            assert (after is None) == (cell[2].zero > 0), cell  # gathered anew


def test_without_a_flip_nothing_is_seen():
    for looks in spmd(steps, 2, CELLS, None, WEIGHT):
        assert looks == [[None] * 4] * len(CELLS)


def test_a_bit_that_flips_later_stays_without_zero_and_else_is_gone_with_the_next_gather():
    for without, *gathered in spmd(steps, 2, CELLS, 1, WEIGHT, True):
        assert without[:3] == [None] * 3
        assert f" holds a changed {WEIGHT}: " in without[3]
        assert gathered == [[None] * 4] * (len(CELLS) - 1)


SHARED = [
    (("moe", "fp32", ParallelConfig(expert=2)), EXPERT, f"rank 1 on {HOST} or rank 3 on {HOST}"),
    (("moe", "bf16", ParallelConfig(expert=2)), "embedding.weight", f"rank 3 on {HOST}"),
    (("gpt2", "fp32", ParallelConfig(tensor=2)), WEIGHT, f"rank 1 on {HOST} or rank 3 on {HOST}"),
    (("gpt2", "bf16", ParallelConfig(sequence=2)), WEIGHT, f"rank 3 on {HOST}"),
]


def shared():
    return [steps([cell], 3, name)[0] for cell, name, _ in SHARED]


@pytest.mark.slow
def test_ranks_that_hold_other_parts_are_not_compared():
    for looks in spmd(shared, 4):
        for (cell, name, named), (*before, noticed, _) in zip(SHARED, looks, strict=True):
            assert before == [None, None], cell
            assert noticed.startswith(f"step 2: {named} holds a changed {name}: "), cell


def balanced():
    """Under ZeRO-3: weights have no replicas; the bias that experts are chosen by has."""
    engine = built("gpt2-moe", "fp32", ParallelConfig(zero=3))
    terms_K = gradients(engine, 1)
    before = seen(engine, 1)
    if World.from_environment().rank == 2:
        next(engine.module.routers())[1].bias[0] += 1
    during = seen(engine, 1)
    engine.update(terms_K, learning_rate=1e-3)
    return before, during


def test_what_balances_a_mixture_is_looked_at_under_every_stage():
    for before, during in spmd(balanced, 3):
        assert before is None
        assert during.startswith(f"step 1: rank 2 on {HOST} holds a changed blocks.0.mlp.router.bias: ")


@settings(deadline=None)  # on a busy machine a process may wait for long
@given(st.sampled_from(list(TYPES)), st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=40), st.integers(0, 9), st.data())
def test_each_bit_counts_and_where_a_weight_lies_does_not(dtype, values, offset, data):
    numbers = torch.tensor(values, dtype=TYPES[dtype])
    elsewhere = torch.cat((torch.zeros(offset, dtype=numbers.dtype), numbers))[offset:]
    assert sum_of_bits(numbers.view(dtype)) == sum_of_bits(elsewhere.view(dtype))
    before = int(sum_of_bits(numbers.view(dtype)))
    bit = data.draw(st.integers(0, numbers.element_size() * 8 - 1))
    numbers[data.draw(st.integers(0, len(values) - 1))] ^= torch.tensor(1 << bit).to(numbers.dtype)
    assert int(sum_of_bits(numbers.view(dtype))) != before


def test_a_weight_whose_elements_lie_apart_is_summed_as_it_is_read():
    weight = torch.randn(6, 10)
    assert sum_of_bits(weight.T) == sum_of_bits(weight.T.contiguous())


def held(*bits, name="w"):
    return [("host", [Holding(name=name, bits=own, holders=tuple(range(len(bits))))]) for own in bits]


@settings(deadline=None)  # on a busy machine a process may wait for long
@given(st.integers(3, 9), st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1), st.data())
def test_the_odd_one_out_of_three_or_more_is_named(ranks, most, other, data):
    odd = data.draw(st.integers(0, ranks - 1))
    bits = [other if rank == odd else most for rank in range(ranks)]
    if most != other:
        assert verdict(held(*bits))[0] == [odd]


@pytest.mark.parametrize("bits", [(1, 2), (1, 1, 2, 2), (1, 2, 3)])
def test_without_a_majority_all_are_named(bits):
    named, message = verdict(held(*bits))
    assert named == list(range(len(bits)))
    assert "and there is no majority" in message


def test_of_many_weights_the_first_is_named_and_of_many_ranks_the_first_few():
    several = [(host, [*one, *two]) for (host, one), (_, two) in zip(held(1, 1, 2), held(1, 1, 2, name="v"), strict=True)]
    assert verdict(several)[1].startswith("rank 2 on host holds a changed w and 1 other weights: ")
    assert verdict(held(*range(9)))[1].startswith("rank 0 on host or rank 1 on host or rank 2 on host or rank 3 on host or 5 more ranks ")


def test_another_corruption_is_another_error_and_the_very_same_at_the_same_step_is_not_retried():
    first, second = (
        Failure(cause=Cause.EXCEPTION, rank=2, step=7, message=f"ReplicaError: step 8: {verdict(held(1, 1, bits))[1]}") for bits in (2, 3)
    )
    assert isinstance(decide([first], RestartPolicy()), Restart)
    assert isinstance(decide([first, second], RestartPolicy()), Restart)
    assert isinstance(decide([first, first], RestartPolicy()), GiveUp)


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
class Flipped:
    """What became of a run in whose step 9 of 15 a bit flips on rank 1, unless it is to be spared. Steps 6 and 12 are saved."""

    losses: list[float]
    failures: list[dict]
    resumed: list[str]  # from which checkpoints

    @classmethod
    def run(cls, workspace, name, *settings, spared=False):
        (workspace.directory / "flipping.py").write_text(FLIPPING)
        marker, home = workspace.directory / f"{name}.marker", workspace.directory / name
        if spared:
            marker.touch()
        model = json.dumps({"family": "flipping:Flipping", "options": {"marker": str(marker)}, **SIZES})
        workspace.train(name, f"model={model}", "train.steps=15", "train.global_batch=12", "cluster.ranks_per_node=3", *settings)
        assert marker.exists(), "no bit was flipped"
        logs = "".join(log.read_text() for log in sorted(home.glob("logs/*/rank-0000.log")))
        return cls(
            [line["train/loss"] for line in read_metrics(home / "metrics.jsonl")],
            [event for event in read_events(home / "events.jsonl") if event["event"] == "rank-failed"],
            re.findall(r"resumed from .*(step-\d+)", logs),
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "zero", "every", "noticed"),
    [("bf16", 1, 1, 9), ("fp32", 0, 1000, 12), ("bf16", 2, 3, 9)],
    ids=["looked at in each step", "looked at when it is saved", "looked at in every third step"],
)
def test_a_run_that_is_corrupted_once_ends_as_if_it_had_not_been(workspace, precision, zero, every, noticed):
    settings = [f"parallel.zero={zero}", f"precision={precision}", f"guard.replica_check_every_steps={every}"]
    undisturbed = Flipped.run(workspace, f"undisturbed {every}", *settings, spared=True)
    assert (undisturbed.failures, undisturbed.resumed) == ([], [])
    corrupted = Flipped.run(workspace, f"corrupted {every}", *settings)
    (fell,) = corrupted.failures
    told = f"ReplicaError: step {noticed}: rank 1 on {HOST} holds a changed blocks.1.mlp.up_proj.weight: its bits sum to "
    assert fell["message"].startswith(told)
    assert (fell["rank"], fell["cause"]) == (1, "EXCEPTION")
    assert corrupted.resumed == ["step-00000006"]
    assert len(corrupted.losses) == 15
    assert corrupted.losses == undisturbed.losses  # bit by bit


@pytest.mark.slow
def test_where_nobody_looks_it_is_learned_from_and_saved(workspace):
    settings = ["parallel.zero=0", "precision=fp32", "guard.replica_check_every_steps=0"]
    undisturbed, corrupted = (Flipped.run(workspace, f"unseen {spared}", *settings, spared=spared) for spared in (True, False))
    assert undisturbed.failures == corrupted.failures == []
    assert corrupted.losses[:8] == undisturbed.losses[:8]
    assert corrupted.losses[8:] != undisturbed.losses[8:]
