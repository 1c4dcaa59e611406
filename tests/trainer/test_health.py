"""A model's health equals a plain computation in one process, under every layout, and measuring it changes nothing."""

import math
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import runs
import torch
from parity import (
    ACCUMULATION,
    DTYPES,
    GLOBAL_BATCH,
    LENGTH,
    LINEAR,
    MODELS,
    RATES,
    Cell,
    batch,
    gather_masters,
    model,
    optimizer_config,
    rows,
    small_buckets,
)
from spmd import spmd
from test_compile import needs_compiler
from torch import Tensor

from manta.launch.report.series import LAST_TITLES, charts, read_run
from manta.trainer import health as health_module
from manta.trainer.config.sections import ParallelConfig, TrainConfig
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine import deepspeed as engines
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.health import Health, entropy, group_of
from manta.trainer.model.layers import Attention, apply_rotary
from manta.trainer.model.transformer import Transformer
from manta.trainer.optim.optimizers import build_optimizer

STEPS = 3
BOUNDS = {"fp32": 5e-6, "bf16-autocast": 0.015, "bf16": 0.015, "fp16": 0.005}
EXACT = 1e-6

CELLS = [
    Cell("gpt2", 1),
    Cell("llama", 2, parallel=ParallelConfig(zero=3)),
    Cell("bert", 2, parallel=ParallelConfig(sequence=2)),
    Cell("moe", 2, parallel=ParallelConfig(expert=2)),
    Cell("gpt2", 4, parallel=ParallelConfig(tensor=2, zero=2)),
    Cell("llama", 2, "bf16", ParallelConfig(zero=1)),
]
MORE = [
    Cell("llama", 2, parallel=ParallelConfig(zero=0)),
    Cell("gpt2-moe", 4, parallel=ParallelConfig(zero=0, expert=2)),
    Cell("moe", 4, parallel=ParallelConfig(zero=2, expert=2, sequence=2)),
    Cell("moe", 2, parallel=ParallelConfig(zero=3, expert=2)),
    Cell("gpt2-moe", 2, parallel=ParallelConfig(tensor=2)),
    Cell("llama", 4, parallel=ParallelConfig(zero=3, tensor=2)),
    Cell("llama", 4, parallel=ParallelConfig(tensor=2, sequence=2)),
    Cell("bert", 2, parallel=ParallelConfig(zero=2, offload=True)),
    Cell("llama", 2, "bf16", ParallelConfig(zero=3, offload=True)),
    Cell("gpt2", 2, "fp32", ParallelConfig(zero=0), "full"),
    Cell("gpt2", 2, "bf16", ParallelConfig(zero=1, tensor=2), "selective"),
    Cell("llama", 2, "bf16-autocast", ParallelConfig(zero=2)),
    Cell("llama", 2, "fp16", ParallelConfig(zero=2), "full"),
    Cell("bert", 2, "bf16", ParallelConfig(zero=3)),
]


def micro_batch(cell: Cell) -> int:
    return GLOBAL_BATCH // (ACCUMULATION * cell.ranks // (cell.parallel.tensor * cell.parallel.sequence))


def measure(cell: Cell, optimizer: str, *, healthy: bool = True, compiled: bool = False) -> tuple[list[dict[str, Any]], list[Any], Any]:
    """Train this rank's part. Return each step's health, each step's loss terms and gradient norm, and the masters."""
    torch.nn.functional.linear = LINEAR
    world = World.from_environment()
    layout = layout_for(TrainConfig(steps=STEPS, global_batch=GLOBAL_BATCH, micro_batch=micro_batch(cell)), cell.parallel, world.size)
    mesh, config = world.mesh(layout), optimizer_config(optimizer, cell.precision)
    options: dict[str, Any] = {"checkpointing": cell.checkpointing, "compile_blocks": compiled}
    with patch.object(engines, "deepspeed_config", small_buckets):
        engine = Engine(model(cell.model), mesh=mesh, optimizer=config, precision=cell.precision, **options)
    lines, outcomes = [], []
    for step in range(STEPS):
        whole = batch(cell.model, step)
        samples = [layout.samples_of_rank(first=0, micro_step=micro_step, rank=mesh.data_rank) for micro_step in range(ACCUMULATION)]
        batches = [rows(whole, numbers) for numbers in samples]
        health = Health(engine) if healthy else None
        if health:
            health.measure_activations(batches)
        terms_K = engine.accumulate(batches)
        with health.measure_update() if health else nullcontext():
            outcome = engine.update(terms_K, learning_rate=RATES[optimizer])
        outcomes.append((outcome.terms.tolist(), outcome.grad_norm))
        lines.append(health.line(outcome.grad_norm, config.gradient_clipping) if health else {})
    masters = gather_masters(engine)[0] if cell.refusal is None else {}
    return lines, outcomes, {name: weight.numpy() for name, weight in masters.items()}


def measure_plainly(cell: Cell, optimizer: str) -> list[dict[str, float]]:
    """Compute the same in one process with autograd, masters beside the model, and every attention logit."""
    trained, masters = model(cell.model).to(DTYPES.get(cell.precision, torch.float32)), model(cell.model)
    masters.load_state_dict({key: weight.float() for key, weight in trained.state_dict().items()})
    config = optimizer_config(optimizer, cell.precision)
    update = build_optimizer(masters.parameters(), config)
    for group in update.param_groups:
        group["lr"] = RATES[optimizer]
    autocast = torch.autocast("cpu", torch.bfloat16) if cell.precision == "bf16-autocast" else nullcontext()
    lines = []
    for step in range(STEPS):
        with autocast:
            line = plain_activations(trained, cell, step)
        trained.train()
        trained.zero_grad()
        whole = batch(cell.model, step)
        counts = trained.counts(whole).float().clamp(min=1)
        with autocast:
            trained(whole, counts).sum().backward()
        old = {name: weight.detach().clone() for name, weight in masters.named_parameters()}
        gradients = {}
        for (name, master), weight in zip(masters.named_parameters(), trained.parameters(), strict=True):
            assert weight.grad is not None
            gradients[name] = master.grad = weight.grad.float()
        line |= {f"health/grad_norm/{group}": norm for group, norm in group_norms(gradients).items()}
        torch.nn.utils.clip_grad_norm_(masters.parameters(), config.gradient_clipping)
        update.step()
        weights = group_norms(old)
        moved = group_norms({name: weight.detach() - old[name] for name, weight in masters.named_parameters()})
        line |= {f"health/weight_norm/{group}": norm for group, norm in weights.items()}
        line |= {f"health/update_ratio/{group}": moved[group] / weights[group] for group in moved}
        for name, router in trained.routers():
            share = [float(load) / float(router.load.sum()) for load in router.load]
            line[f"health/expert_entropy/{name}"] = -sum(p * math.log(p) for p in share if p) / math.log(len(share))
            router.end_step(router.load.float())
        with torch.no_grad():
            for master, weight in zip(masters.parameters(), trained.parameters(), strict=True):
                weight.copy_(master)
        lines.append(line)
    return lines


def group_norms(weights: dict[str, Tensor]) -> dict[str, float]:
    groups: dict[str, list[Tensor]] = {}
    for name, weight in weights.items():
        groups.setdefault(group_of(name), []).append(weight.double().flatten())
    return {group: float(torch.cat(parts).norm()) for group, parts in groups.items()}


@torch.no_grad()
def plain_activations(trained: Transformer, cell: Cell, step: int) -> dict[str, float]:
    """Return the activations of the whole batch, and the logits of the sequences that are first in a micro batch."""
    whole, line, handles = batch(cell.model, step), {}, []
    real_BT, first = whole.documents >= 0, torch.arange(0, GLOBAL_BATCH, micro_batch(cell))
    positions = torch.arange(LENGTH)
    attends = (whole.documents[:, :, None] == whole.documents[:, None, :]) & real_BT[:, :, None]
    if MODELS[cell.model].family != "bert":
        attends &= positions[:, None] >= positions
        attends &= positions[:, None] - positions < (MODELS[cell.model].sliding_window or LENGTH)

    def output_of(name: str) -> Any:
        def hook(_: object, __: object, output: Any) -> None:
            x_BTD = output[0] if isinstance(output, tuple) else output
            line[f"health/activation_rms/{name}"] = float(x_BTD[real_BT].double().square().mean().sqrt())

        return hook

    def logits_of(name: str) -> Any:
        def hook(layer: Attention, inputs: tuple[Any, ...]) -> None:
            x_BTD, context = inputs[:2]
            q, k = (p(x_BTD).unflatten(-1, (-1, layer.head_width)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = layer.q_norm(q), layer.k_norm(k)
            if context.rotary is not None:
                q, k = apply_rotary(q, context.rotary), apply_rotary(k, context.rotary)
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            logits = torch.einsum("bnth,bnsh->bnts", q.double(), k.double()) / math.sqrt(layer.head_width)
            line[f"health/attention_logit/{name}"] = float(logits.masked_fill(~attends[:, None], -math.inf)[first].max())

        return hook

    for number, block in enumerate(trained.blocks):
        handles += [block.register_forward_hook(output_of(f"blocks.{number}"))]
        handles += [block.get_submodule("attention").register_forward_pre_hook(logits_of(f"blocks.{number}"))]
    trained.eval()
    trained(whole, torch.ones(len(trained.terms)))
    for handle in handles:
        handle.remove()
    return line


def worst(lines: list[dict[str, float]], expected: list[dict[str, float]]) -> dict[str, float]:
    """Return the largest relative difference of each kind of value, over steps and groups."""
    found: dict[str, float] = {}
    for line, plain in zip(lines, expected, strict=True):
        assert line.keys() == plain.keys()
        for key, value in line.items():
            kind = key.split("/")[1]
            found[kind] = max(found.get(kind, 0.0), abs(value - plain[key]) / abs(plain[key]))
    return found


KINDS = {"grad_norm", "weight_norm", "update_ratio", "activation_rms", "attention_logit"}


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cell", [*CELLS, *(pytest.param(cell, marks=pytest.mark.slow) for cell in MORE)], ids=str)
def test_health_under_a_layout_equals_a_plain_computation(cell, optimizer):
    expected = spmd(measure_plainly, 1, cell, optimizer)[0]
    for lines, outcomes, _ in spmd(measure, cell.ranks, cell, optimizer):
        differences = worst(lines, expected)
        assert differences.keys() == KINDS | ({"expert_entropy"} if "moe" in cell.model else set())
        assert max(differences.values()) < BOUNDS[cell.precision], differences
        for line, (_, grad_norm) in zip(lines, outcomes, strict=True):
            total = math.sqrt(sum(value**2 for key, value in line.items() if key.startswith("health/grad_norm/")))
            assert total == pytest.approx(grad_norm, rel=EXACT if cell.precision == "fp32" else 1e-4)


@pytest.mark.parametrize(
    "cell",
    [
        Cell("gpt2", 2, parallel=ParallelConfig(zero=1)),
        pytest.param(Cell("moe", 2, "bf16", ParallelConfig(zero=3), "full"), marks=pytest.mark.slow),
        pytest.param(Cell("gpt2-moe", 2, "fp16", ParallelConfig(zero=2), "selective"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_measuring_health_changes_no_loss_and_no_weight(cell):
    for (_, *healthy), (_, *plain) in zip(spmd(measure, 2, cell, "adamw"), spmd(measure_not, 2, cell), strict=True):
        assert healthy[0] == plain[0]
        assert len(healthy[1]) > 10
        assert all((weight == plain[1][name]).all() for name, weight in healthy[1].items())


def measure_not(cell: Cell) -> Any:
    return measure(cell, "adamw", healthy=False)


def measure_compiled(cell: Cell, healthy: bool) -> tuple[Any, int]:
    from torch._dynamo.utils import counters

    return measure(cell, "adamw", healthy=healthy, compiled=True), counters["stats"]["unique_graphs"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)  # the first compilation takes minutes on a busy machine
@pytest.mark.parametrize("cell", [Cell("llama", 2, "fp32", ParallelConfig(zero=2), "full"), Cell("gpt2-moe", 1)], ids=str)
def test_compiled_blocks_have_the_same_health_and_no_more_graphs(cell):
    expected = spmd(measure_plainly, 1, cell, "adamw")[0]
    measured, plain = (spmd(measure_compiled, cell.ranks, cell, healthy, timeout=400.0) for healthy in (True, False))
    for ((lines, *healthy), graphs), ((_, *unmeasured), plain_graphs) in zip(measured, plain, strict=True):
        assert max(worst(lines, expected).values()) < 1e-4
        assert graphs == plain_graphs > 0
        assert healthy[0] == unmeasured[0]
        assert all((weight == unmeasured[1][name]).all() for name, weight in healthy[1].items())


def count_every_part(*_: Any) -> bool:
    return True


def measure_with_a_fault(cell: Cell, name: str, fault: Any) -> Any:
    with patch.object(health_module, name, fault):
        return measure(cell, "sgd")[0]


@pytest.mark.parametrize(
    ("cell", "name", "fault", "kinds"),
    [
        (Cell("gpt2", 2, parallel=ParallelConfig(tensor=2)), "is_counted", count_every_part, {"grad_norm", "weight_norm"}),
        pytest.param(
            *(Cell("gpt2", 2, parallel=ParallelConfig(zero=0)), "is_counted", count_every_part, {"grad_norm", "weight_norm"}),
            marks=pytest.mark.slow,
        ),
        (Cell("gpt2", 1), "UPDATE", 1, {"update_ratio"}),
    ],
    ids=["replicas of norms counted twice", "every replica counted", "updates added to weights"],
)
def test_the_comparison_detects_a_fault(cell, name, fault, kinds):
    expected = spmd(measure_plainly, 1, cell, "sgd")[0]
    differences = worst(spmd(measure_with_a_fault, cell.ranks, cell, name, fault)[0], expected)
    assert {kind for kind, difference in differences.items() if difference > BOUNDS["fp32"]} >= kinds


def skip_an_update() -> list[dict[str, float]]:
    world, layout = World.from_environment(), layout_for(TrainConfig(steps=1, global_batch=16, micro_batch=8), ParallelConfig(), 2)
    engine = Engine(model("llama"), mesh=world.mesh(layout), optimizer=optimizer_config("sgd"), precision="fp32")
    lines = []
    for does_update in (False, True):
        health, share = Health(engine), rows(batch("llama", 0), range(8 * world.rank, 8 * world.rank + 8))
        health.measure_activations([share])
        terms_K, norm = engine.accumulate([share]), math.nan
        with health.measure_update():
            if does_update:
                norm = engine.update(terms_K, learning_rate=0.1).grad_norm
        engine.module.zero_grad()
        lines.append(health.line(norm, 0.25))
    return lines


def test_a_skipped_update_has_no_norms():
    for skipped, done in spmd(skip_an_update, 2):
        assert {key.split("/")[1] for key in skipped} == {"activation_rms", "attention_logit"}
        assert {key.split("/")[1] for key in done} == KINDS


@pytest.mark.parametrize(
    ("shares", "expected"), [([0.25] * 4, 1.0), ([1.0, 0.0, 0.0, 0.0], 0.0), ([0.5, 0.5, 0.0, 0.0], 0.5), ([1.0], 1.0)], ids=str
)
def test_entropy_is_1_for_an_even_load_and_0_for_one_expert(shares, expected):
    assert entropy(torch.tensor(shares)) == pytest.approx(expected)


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_embedding_blocks_experts_and_the_rest(name):
    groups = set(map(group_of, dict(model(name).named_parameters())))
    blocks = {"blocks.0", "blocks.1"} | ({"blocks.0.experts", "blocks.1.experts"} if "moe" in name else set())
    rest = {"llama": {"norm", "head"}, "bert": {"transform", "transform_norm", "head", "pooler", "next_sentence"}}
    assert groups == {"embedding"} | blocks | rest.get(name, {"norm"})


def test_a_run_logs_its_health_and_trains_as_without_it(workspace, finished_run):
    workspace.train("healthy", "track.health_every_steps=5", "track.every_steps=2")
    unmeasured = {line["step"]: line for line in runs.lines(workspace, finished_run)}
    logged = runs.lines(workspace, "healthy")
    assert [line["step"] for line in logged] == [step for step in range(1, 41) if step % 2 == 0 or step % 5 == 0]
    for line in logged:
        assert (line["train/loss"], line["grad_norm"]) == (unmeasured[line["step"]]["train/loss"], unmeasured[line["step"]]["grad_norm"])
        found = {key.split("/")[1] for key in line if key.startswith("health/")}
        assert found == (KINDS if line["step"] % 5 == 0 else set())
        if found:
            total = math.sqrt(sum(value**2 for key, value in line.items() if key.startswith("health/grad_norm/")))
            assert total == pytest.approx(line["grad_norm"], rel=EXACT)
    drawn, left_out = charts([read_run(workspace.directory / "healthy")])
    labels = {chart["title"]: [curve["label"] for curve in chart["curves"]] for chart in drawn}
    assert left_out == 0
    for kind in KINDS:
        blocks = ["blocks.0", "blocks.1"]
        expected = blocks if kind in {"activation_rms", "attention_logit"} else ["embedding", *blocks, "norm"]
        assert labels[LAST_TITLES[f"health/{kind}"]] == expected
