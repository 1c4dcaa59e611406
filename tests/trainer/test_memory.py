"""A rank holds what ZeRO's formula says: counted in every storage that torch has, not told by DeepSpeed."""

import gc
import time
import warnings
from dataclasses import dataclass

import pytest
import torch
from spmd import spmd
from torch import Tensor

from manta.trainer.config.model import ExpertsConfig, ModelConfig
from manta.trainer.config.training import OptimizerConfig, ParallelConfig, Precision, TrainConfig
from manta.trainer.dataloader.batch import Batch
from manta.trainer.dist.layout import Layout, layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.engine.memory import MOMENTS, Memory, estimate, shapes
from manta.trainer.model.build import build
from manta.trainer.optim.optimizers import STATES, build_optimizer

MODEL = ModelConfig(layers=4, width=256, heads=8, mlp_width=1024)
MIXTURE = MODEL.model_copy(update={"layers": 2, "experts": ExpertsConfig(experts=4, width=512)})
VOCABULARY, LENGTH = 4000, 16  # the vocabulary is padded to 4096
WEIGHTS = {"embedding.weight": (4096, 256), "norm.weight": (256,)}
P = 4096 * 256 + 256


@dataclass(frozen=True)
class Held:
    """Bytes of all storages on one rank."""

    stepping: int  # after backward, before the optimizer's step
    between: int  # after a step
    formula: Memory
    layout: Layout


def measure(config: ModelConfig, precision: Precision, parallel: ParallelConfig, optimizer: str, *, copied: bool = False) -> Held:
    """The most that this rank holds in two optimizer steps, each of two micro batches."""
    warnings.simplefilter("ignore")  # of torch's, on what is asked of objects while they are counted
    world = World.from_environment()
    layout = layout_for(TrainConfig(steps=2, global_batch=2 * world.size, micro_batch=1), parallel, world.size)
    mesh = world.mesh(layout)
    before = _storages()
    model = build(config, vocabulary=VOCABULARY, sequence_length=LENGTH)
    model.initialize(seed=1)
    kept = [parameter.detach().clone() for parameter in model.parameters()] if copied else []
    engine = Engine(model, mesh=mesh, optimizer=OptimizerConfig(name=optimizer), precision=precision)
    stepping, between = [], []
    step = engine.deepspeed.step

    def counted() -> None:
        if engine.deepspeed.is_gradient_accumulation_boundary():
            time.sleep(0.2)  # what was exchanged is let go by gloo's own threads, each when its turn comes
            stepping.append(_held(before))
        step()

    engine.deepspeed.step = counted
    tokens = torch.arange(LENGTH)[None]
    batch = Batch(tokens=tokens, targets=tokens, positions=tokens, keys=torch.zeros(1, dtype=torch.int64))
    for _ in range(2):
        engine.step([batch] * layout.accumulation(2 * world.size), learning_rate=1e-3)
        between.append(_held(before))
    del kept
    wholes = shapes(config, vocabulary=VOCABULARY, sequence_length=LENGTH)
    formula = estimate(wholes, layout, precision, optimizer)
    return Held(stepping=max(stepping), between=max(between), formula=formula, layout=layout)


def _storages() -> dict[int, torch.UntypedStorage]:
    """By address. Gradients have no Python object before they are asked for."""
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    tensors += [found.grad for found in tensors if found.is_leaf and found.grad is not None]
    storages = (found.untyped_storage() for found in tensors if found.device.type == "cpu" and found.layout == torch.strided)
    return {storage.data_ptr(): storage for storage in storages}


def _held(before: dict[int, torch.UntypedStorage]) -> int:
    """Those from before are still held, so that no address is given out twice."""
    return sum(storage.nbytes() for address, storage in _storages().items() if address not in before)


def agrees(held: Held) -> None:
    formula = held.formula
    # ZeRO-1 lets go of a gradient once the rank that needs it has it, and between steps there need be none.
    share = formula.gradients / held.layout.replicas if held.layout.zero == 1 else formula.gradients
    assert 0.9 * (formula.total - formula.gradients) <= held.between <= 1.1 * formula.total
    assert 0.9 * (formula.total - formula.gradients + share) <= held.stepping <= 1.1 * formula.total


CELLS = [("fp32", 0), *((precision, stage) for precision in ("fp32", "bf16") for stage in (1, 2, 3))]


@pytest.mark.parametrize(
    ("precision", "stage"),
    [("fp32", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3), *(pytest.param("fp32", stage, marks=pytest.mark.slow) for stage in (1, 2, 3))],
)
def test_a_rank_holds_what_zeros_formula_says(precision, stage):
    for held in spmd(measure, 2, MODEL, precision, ParallelConfig(zero=stage), "adamw"):
        agrees(held)


def one_copy_more(precision: Precision) -> Held:
    return measure(MODEL, precision, ParallelConfig(), "adamw", copied=True)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_the_count_notices_a_copy_too_many(precision):
    with pytest.raises(AssertionError):
        agrees(spmd(one_copy_more, 2, precision)[0])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("precision", "stage"), CELLS)
def test_four_ranks_hold_what_zeros_formula_says(precision, stage, optimizer):
    for held in spmd(measure, 4, MODEL, precision, ParallelConfig(zero=stage), optimizer):
        agrees(held)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [ParallelConfig(tensor=2), ParallelConfig(sequence=2, zero=2)], ids=str)
def test_a_rank_that_shares_matrices_or_sequences_holds_what_the_formula_says(parallel):
    for held in spmd(measure, 4, MODEL, "bf16", parallel, "adamw"):
        agrees(held)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_that_shares_experts_holds_what_the_formula_says(stage):
    for held in spmd(measure, 4, MIXTURE, "bf16", ParallelConfig(expert=2, zero=stage), "adamw"):
        agrees(held)


def layout(ranks: int = 4, **sizes) -> Layout:
    return Layout(**{"data": ranks, "micro_batch": 1} | sizes)


@pytest.mark.parametrize(("stage", "bytes_"), [(0, 16 * P), (1, 4 * P + 12 * P // 4), (2, 2 * P + 14 * P // 4), (3, 16 * P // 4)])
def test_sixteen_bits_are_the_papers_formula(stage, bytes_):
    assert estimate(WEIGHTS, layout(zero=stage), "bf16", "adamw").total == bytes_


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast"])
@pytest.mark.parametrize(("stage", "bytes_"), [(0, 16 * P), (1, 8 * P + 12 * P // 4), (2, 4 * P + 16 * P // 4), (3, 20 * P // 4)])
def test_without_zero_an_fp32_weight_is_its_own_master_and_has_a_copy_with_it(stage, bytes_, precision):
    assert estimate(WEIGHTS, layout(zero=stage), precision, "adamw").total == bytes_


def test_the_papers_figures_for_7_5_billion_weights_on_64_ranks():
    """ZeRO, figure 1: 120 GB, and 31.4, 16.6 and 1.9 GB in stages 1 to 3."""
    billions = {"w": (7_500_000_000,)}
    totals = [estimate(billions, layout(64, zero=stage), "fp16", "adamw").total / 1e9 for stage in range(4)]
    assert [round(total, 1) for total in totals] == [120.0, 31.4, 16.6, 1.9]


def test_experts_are_cut_over_fewer_ranks():
    experts = {"blocks.0.mlp.experts.up_proj": (8, 64, 32)}
    size = 8 * 64 * 32
    memory = estimate(experts, layout(zero=1, expert=2), "bf16", "adamw")
    assert (memory.weights, memory.masters) == (2 * size // 2, 4 * size // 2 // 2)


def test_tensor_ranks_share_what_the_cut_table_names():
    memory = estimate(WEIGHTS, layout(2, zero=1, tensor=2), "bf16", "sgd")
    assert memory.weights == 2 * (4096 * 256 // 2 + 256)
    assert memory.optimizer == memory.masters == memory.weights


def test_what_is_offloaded_lies_on_the_host():
    memory = estimate(WEIGHTS, layout(zero=2, offload=True), "bf16", "adamw")
    assert (memory.device, memory.host) == (2 * P + 2 * P // 4, 12 * P // 4)


def test_shapes_are_the_models_and_cost_nothing():
    wholes = shapes(MODEL.model_copy(update={"width": 2**16, "layers": 80}), vocabulary=VOCABULARY, sequence_length=LENGTH)
    assert wholes["embedding.weight"] == (4096, 2**16)
    model = build(MODEL, vocabulary=VOCABULARY, sequence_length=LENGTH)
    held = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes(MODEL, vocabulary=VOCABULARY, sequence_length=LENGTH) == held


@pytest.mark.parametrize("name", MOMENTS)
def test_the_moments_are_what_the_optimizer_keeps(name):
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(2, 2))], OptimizerConfig(name=name))
    assert len(STATES[type(optimizer)]) == MOMENTS[name]
