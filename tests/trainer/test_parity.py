"""A slice of the parity table that touches each model, layout and precision once; `make parity` runs it whole and writes docs/parity.md."""

from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch
from parity import BOUNDS, MODELS, OPTIMIZERS, Cell, Trace, batch, model, optimizer_config, plain_all, under, under_all
from parity_table import CONTROLS, MORE, PRECISIONS, SHARES, STAGES, cells, each_doubled
from spmd import spmd

from manta.trainer.config.sections import ParallelConfig, TrainConfig
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine

QUICK = [
    Cell("gpt2", 1, "bf16", ParallelConfig(zero=1)),
    Cell("gpt2", 2, "fp32", ParallelConfig(zero=0), "full"),
    Cell("gpt2", 2, "bf16", ParallelConfig(zero=1, tensor=2), "selective"),
    Cell("gpt2", 4, "fp32", ParallelConfig(zero=1, tensor=2, sequence=2)),
    Cell("llama", 2, "fp16", ParallelConfig(zero=2), "full"),
    Cell("llama", 2, "bf16", ParallelConfig(zero=3, offload=True)),
    Cell("llama", 2, "bf16-autocast", ParallelConfig(zero=1, sequence=2)),
    Cell("llama", 2, "fp8", ParallelConfig(zero=2)),
    Cell("bert", 2, "fp32", ParallelConfig(zero=2, offload=True)),
    Cell("moe", 4, "fp32", ParallelConfig(zero=1, expert=4)),
    Cell("gpt2-moe", 4, "fp32", ParallelConfig(zero=1, expert=2)),
    Cell("gpt2-moe", 2, "fp32", ParallelConfig(zero=1, offload=True)),
]
"""Each model, precision, ZeRO stage, kind of share, and what lies on top: offloading and recomputation."""
SLICE = [
    *QUICK,
    Cell("gpt2", 4, "fp32", ParallelConfig(zero=0)),
    Cell("llama", 4, "fp32", ParallelConfig(zero=3, tensor=2)),
    Cell("llama", 4, "fp32", ParallelConfig(zero=1, tensor=4)),
    Cell("bert", 4, "fp32", ParallelConfig(zero=1)),
    Cell("bert", 2, "bf16", ParallelConfig(zero=3), "full"),
    Cell("bert", 4, "fp32", ParallelConfig(zero=2, sequence=4)),
    Cell("moe", 2, "fp32", ParallelConfig(zero=3, expert=2)),
    Cell("moe", 4, "bf16", ParallelConfig(zero=2, expert=2, sequence=2)),
    Cell("moe", 4, "fp32", ParallelConfig(zero=2, expert=4, sequence=2)),
    Cell("gpt2-moe", 2, "fp32", ParallelConfig(zero=1, tensor=2)),
    Cell("gpt2-moe", 4, "fp16", ParallelConfig(zero=1, sequence=2)),
]


@cache
def reference(model, precision) -> dict:
    return spmd(plain_all, 1, [(model, precision)])[0]


@pytest.mark.parametrize("cell", [*QUICK, *(pytest.param(cell, marks=pytest.mark.slow) for cell in SLICE[len(QUICK) :])], ids=str)
def test_a_layout_equals_one_plain_process(cell):
    assert cell.refusal is None
    for traces in spmd(under_all, cell.ranks, [cell]):
        for optimizer in OPTIMIZERS:
            difference = traces[0][optimizer].differs(reference(cell.model, cell.precision)[cell.model, cell.precision, optimizer])
            assert difference.within(BOUNDS[cell.precision])


def test_what_is_quick_of_it_has_each_model_precision_stage_and_kind_of_share():
    assert {cell.model for cell in QUICK} == MODELS.keys()
    assert {cell.precision for cell in QUICK} == set(PRECISIONS)
    assert {cell.parallel.zero for cell in QUICK} == {0, 1, 2, 3}
    assert {cell.ranks for cell in QUICK} == {1, 2, 4}
    assert {cell.checkpointing for cell in QUICK} == {"none", "selective", "full"}
    for kind in ("tensor", "sequence", "expert", "offload"):
        assert any(getattr(cell.parallel, kind) > 1 or getattr(cell.parallel, kind) is True for cell in QUICK), kind


def test_the_slice_touches_each_model_and_each_row_and_column_of_the_table():
    assert {cell.model for cell in SLICE} == MODELS.keys()
    assert {cell.precision for cell in SLICE} == set(PRECISIONS)
    layers = {(cell.parallel.zero, cell.parallel.offload, cell.checkpointing) for cell in SLICE}
    assert layers == {*STAGES, *MORE} - {(3, False, "selective")}, "which is refused"
    shared = {(cell.ranks, cell.parallel.tensor, cell.parallel.sequence, cell.parallel.expert) for cell in SLICE}
    assert shared == {
        (ranks, *(shares.get(key, 1) for key in ("tensor", "sequence", "expert")))
        for ranks, shares in SHARES
        if not {"tensor", "expert"} <= shares.keys()  # which is refused
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("fault", "cell", "put_in"),
    [pytest.param(*control, marks=[pytest.mark.slow] if control[1].precision == "bf16" else []) for control in CONTROLS],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_the_comparison_notices_a_fault(fault, cell, put_in, optimizer):
    wanted = reference(cell.model, cell.precision)[cell.model, cell.precision, optimizer]
    difference = spmd(under, cell.ranks, cell, optimizer, put_in)[0].differs(wanted)
    assert not difference.within(BOUNDS[cell.precision]), fault


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2-moe"])
def test_the_comparison_notices_a_doubled_gradient_of_any_one_weight(name):
    differences = spmd(each_doubled, 1, name, "bf16")[0]
    assert len(differences) > 30
    assert [weight for weight, difference in differences.items() if difference.within(BOUNDS["bf16"])] == []


def test_the_comparison_notices_bf16_without_zero():
    """It is refused; run in spite of that, it is wrong as the table says."""
    cell = Cell("llama", 2, "bf16", ParallelConfig(zero=0))
    assert cell.refusal is not None
    wanted: Trace = reference("llama", "bf16")["llama", "bf16", "adamw"]
    assert not spmd(under, 2, cell, "adamw")[0].differs(wanted).within(BOUNDS["bf16"])


def wrong_under_zero_3() -> tuple[Trace, Trace]:
    plainly = Cell("gpt2", 1, "fp32", ParallelConfig(zero=3))
    again = replace(plainly, checkpointing="selective")
    assert again.refusal is not None
    return under(plainly, "sgd"), under(again, "sgd")


@pytest.mark.slow
def test_the_comparison_notices_selective_recomputation_under_zero_3():
    """It is refused; run in spite of that, biases are added twice."""
    ours, theirs = spmd(wrong_under_zero_3, 1)[0]
    assert not ours.differs(theirs).within(BOUNDS["fp32"])


def kept_by(precision: str) -> tuple[torch.dtype, torch.dtype]:
    """Of a linear layer's product in training and in evaluation, where DeepSpeed asks as on a GPU whether autocast is on around it."""
    world, layout = World.from_environment(), layout_for(TrainConfig(steps=1, global_batch=16, micro_batch=16), ParallelConfig(), 1)
    engine = Engine(model("llama"), mesh=world.mesh(layout), optimizer=optimizer_config("sgd"), precision=precision)
    seen = []
    engine.module.get_submodule("blocks.0.mlp.up_proj").register_forward_hook(lambda _, __, product: seen.append(product.dtype))
    asked = torch.is_autocast_enabled
    with patch("torch.is_autocast_enabled", lambda device="cpu": asked(device)):
        engine.step([batch("llama", 0)], learning_rate=0.1)
        engine.evaluate(batch("llama", 0))
    return tuple(seen)


def test_under_autocast_products_are_in_bf16():
    assert spmd(kept_by, 1, "bf16-autocast")[0] == (torch.bfloat16, torch.bfloat16)
    assert spmd(kept_by, 1, "fp32")[0] == (torch.float32, torch.float32)


def test_each_refused_cell_gives_its_reason():
    reasons = {cell.refusal for model in MODELS for cell in cells(model)} - {None}
    for start in (
        "parallel.zero: expected 1, 2 or 3 in bf16",
        "parallel.zero: expected 1, 2 or 3 in fp16",
        "parallel.zero: expected 1 or 2 in fp8, which keeps the weights",
        "train.activation_checkpointing: expected none or full under ZeRO-3",
        "parallel.tensor: expected 1 in fp8",
        "parallel.expert: expected 1 for a model without experts",
        "parallel.expert: expected 1 with parallel.tensor 2",
    ):
        assert any(reason.startswith(start) for reason in reasons), start
    assert all(": expected " in reason and ", got " in reason and reason.endswith(".") for reason in reasons)
