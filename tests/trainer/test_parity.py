"""A slice of the parity table with every model, layout and precision; `make parity` runs the whole table and writes docs/parity.md."""

from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch
from parity import BOUNDS, MODELS, OPTIMIZERS, Cell, Trace, batch, model, optimizer_config, run_cell, run_cells, run_plain_cells
from parity_table import CONTROLS, EXTRA_STAGES, PRECISIONS, SIZES_BY_RANKS, STAGES, cells, double_each_gradient
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
"""Every model, precision, ZeRO stage and kind of parallelism, offloading and activation checkpointing."""
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
    return spmd(run_plain_cells, 1, [(model, precision)])[0]


@pytest.mark.parametrize("cell", [*QUICK, *(pytest.param(cell, marks=pytest.mark.slow) for cell in SLICE[len(QUICK) :])], ids=str)
def test_a_layout_equals_one_plain_process(cell):
    assert cell.refusal is None
    for traces in spmd(run_cells, cell.ranks, [cell]):
        for optimizer in OPTIMIZERS:
            difference = traces[0][optimizer].difference(reference(cell.model, cell.precision)[cell.model, cell.precision, optimizer])
            assert difference.within(BOUNDS[cell.precision])


def test_quick_cells_cover_every_model_precision_stage_and_parallelism():
    assert {cell.model for cell in QUICK} == MODELS.keys()
    assert {cell.precision for cell in QUICK} == set(PRECISIONS)
    assert {cell.parallel.zero for cell in QUICK} == {0, 1, 2, 3}
    assert {cell.ranks for cell in QUICK} == {1, 2, 4}
    assert {cell.checkpointing for cell in QUICK} == {"none", "selective", "full"}
    for kind in ("tensor", "sequence", "expert", "offload"):
        assert any(getattr(cell.parallel, kind) > 1 or getattr(cell.parallel, kind) is True for cell in QUICK), kind


def test_the_slice_covers_every_row_and_column_of_the_table():
    assert {cell.model for cell in SLICE} == MODELS.keys()
    assert {cell.precision for cell in SLICE} == set(PRECISIONS)
    stages = {(cell.parallel.zero, cell.parallel.offload, cell.checkpointing) for cell in SLICE}
    assert stages == {*STAGES, *EXTRA_STAGES} - {(3, False, "selective")}, "unsupported"
    sizes = {(cell.ranks, cell.parallel.tensor, cell.parallel.sequence, cell.parallel.expert) for cell in SLICE}
    assert sizes == {
        (ranks, *(options.get(key, 1) for key in ("tensor", "sequence", "expert")))
        for ranks, options in SIZES_BY_RANKS
        if not {"tensor", "expert"} <= options.keys()  # unsupported
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("fault", "cell", "inject"),
    [pytest.param(*control, marks=[pytest.mark.slow] if control[1].precision == "bf16" else []) for control in CONTROLS],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_the_comparison_detects_a_fault(fault, cell, inject, optimizer):
    expected = reference(cell.model, cell.precision)[cell.model, cell.precision, optimizer]
    difference = spmd(run_cell, cell.ranks, cell, optimizer, inject)[0].difference(expected)
    assert not difference.within(BOUNDS[cell.precision]), fault


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2-moe"])
def test_the_comparison_detects_a_doubled_gradient_of_any_weight(name):
    differences = spmd(double_each_gradient, 1, name, "bf16")[0]
    assert len(differences) > 30
    assert [weight for weight, difference in differences.items() if difference.within(BOUNDS["bf16"])] == []


def test_the_comparison_detects_the_error_of_bf16_without_zero():
    """It is unsupported; if run anyway, it is wrong."""
    cell = Cell("llama", 2, "bf16", ParallelConfig(zero=0))
    assert cell.refusal is not None
    expected: Trace = reference("llama", "bf16")["llama", "bf16", "adamw"]
    assert not spmd(run_cell, 2, cell, "adamw")[0].difference(expected).within(BOUNDS["bf16"])


def selective_checkpointing_under_zero_3() -> tuple[Trace, Trace]:
    cell = Cell("gpt2", 1, "fp32", ParallelConfig(zero=3))
    selective = replace(cell, checkpointing="selective")
    assert selective.refusal is not None
    return run_cell(cell, "sgd"), run_cell(selective, "sgd")


@pytest.mark.slow
def test_the_comparison_detects_selective_checkpointing_under_zero_3():
    """It is unsupported; if run anyway, it adds biases twice."""
    expected, selective = spmd(selective_checkpointing_under_zero_3, 1)[0]
    assert not expected.difference(selective).within(BOUNDS["fp32"])


def product_dtypes(precision: str) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype of a linear layer's product in training and in evaluation, if DeepSpeed checks for autocast as on a GPU."""
    world, layout = World.from_environment(), layout_for(TrainConfig(steps=1, global_batch=16, micro_batch=16), ParallelConfig(), 1)
    engine = Engine(model("llama"), mesh=world.mesh(layout), optimizer=optimizer_config("sgd"), precision=precision)
    dtypes = []
    engine.module.get_submodule("blocks.0.mlp.up_proj").register_forward_hook(lambda _, __, product: dtypes.append(product.dtype))
    is_enabled = torch.is_autocast_enabled
    with patch("torch.is_autocast_enabled", lambda device="cpu": is_enabled(device)):
        engine.step([batch("llama", 0)], learning_rate=0.1)
        engine.evaluate(batch("llama", 0))
    return tuple(dtypes)


def test_under_autocast_products_are_in_bf16():
    assert spmd(product_dtypes, 1, "bf16-autocast")[0] == (torch.bfloat16, torch.bfloat16)
    assert spmd(product_dtypes, 1, "fp32")[0] == (torch.float32, torch.float32)


def test_each_unsupported_cell_has_a_reason():
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
