"""A rank's memory matches ZeRO's formula, counted over all of torch's storages instead of reported by DeepSpeed."""

import gc
import time
import warnings
from dataclasses import dataclass

import pytest
import torch
from spmd import spmd
from torch import Tensor

from manta.trainer.config.model import ExpertsConfig, ModelConfig
from manta.trainer.config.sections import OptimizerConfig, ParallelConfig, Precision, TrainConfig
from manta.trainer.dataloader.batch import Batch
from manta.trainer.dist.layout import Layout, layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.engine.memory import MOMENTS, MemoryEstimate, estimate_memory
from manta.trainer.model.build import build_model
from manta.trainer.optim.optimizers import STATE_KEYS, build_optimizer

MODEL = ModelConfig(layers=4, width=256, heads=8, mlp_width=1024)
MIXTURE = MODEL.model_copy(update={"layers": 2, "experts": ExpertsConfig(experts=4, width=512)})
VOCABULARY, LENGTH = 4000, 16  # the vocabulary is padded to 4096
WEIGHTS = {"embedding.weight": (4096, 256), "norm.weight": (256,)}
P = 4096 * 256 + 256


@dataclass(frozen=True)
class Measurement:
    """Bytes of all storages on one rank."""

    stepping: int  # after backward, before the optimizer's step
    between: int  # after a step
    formula: MemoryEstimate
    layout: Layout


def measure(config: ModelConfig, precision: Precision, parallel: ParallelConfig, optimizer: str, *, copied: bool = False) -> Measurement:
    """Return this rank's peak over two optimizer steps, each of two micro batches."""
    warnings.simplefilter("ignore")  # torch warns about attributes that are read while objects are counted
    world = World.from_environment()
    layout = layout_for(TrainConfig(steps=2, global_batch=2 * world.size, micro_batch=1), parallel, world.size)
    mesh = world.mesh(layout)
    before = _storages()
    model = build_model(config, vocabulary=VOCABULARY, sequence_length=LENGTH)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}  # before they are sharded
    model.initialize(seed=1)
    extra = [parameter.detach().clone() for parameter in model.parameters()] if copied else []
    engine = Engine(model, mesh=mesh, optimizer=OptimizerConfig(name=optimizer), precision=precision)
    stepping, between = [], []
    step = engine.deepspeed.step

    def counted() -> None:
        if engine.deepspeed.is_gradient_accumulation_boundary():
            time.sleep(0.2)  # gloo's threads free their buffers with a delay
            stepping.append(_bytes(before))
        step()

    engine.deepspeed.step = counted
    tokens = torch.arange(LENGTH)[None]
    batch = Batch(tokens=tokens, targets=tokens, positions=tokens, keys=torch.zeros(1, dtype=torch.int64))
    for _ in range(2):
        engine.step([batch] * layout.accumulation(2 * world.size), learning_rate=1e-3)
        between.append(_bytes(before))
    del extra
    formula = estimate_memory(shapes, layout, precision, optimizer)
    return Measurement(stepping=max(stepping), between=max(between), formula=formula, layout=layout)


def _storages() -> dict[int, torch.UntypedStorage]:
    """Return all storages by address. Gradients have no Python object before they are read."""
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    tensors += [found.grad for found in tensors if found.is_leaf and found.grad is not None]
    storages = (found.untyped_storage() for found in tensors if found.device.type == "cpu" and found.layout == torch.strided)
    return {storage.data_ptr(): storage for storage in storages}


def _bytes(before: dict[int, torch.UntypedStorage]) -> int:
    """Return the bytes of new storages. `before` keeps the old ones alive, so that no address is reused."""
    return sum(storage.nbytes() for address, storage in _storages().items() if address not in before)


def assert_matches_formula(measured: Measurement) -> None:
    formula = measured.formula
    # ZeRO-1 frees a gradient once the rank that needs it has received it; between steps there need be none.
    gradients = formula.gradients / measured.layout.replicas if measured.layout.zero == 1 else formula.gradients
    assert 0.9 * (formula.total - formula.gradients) <= measured.between <= 1.1 * formula.total
    assert 0.9 * (formula.total - formula.gradients + gradients) <= measured.stepping <= 1.1 * formula.total


CELLS = [("fp32", 0), *((precision, stage) for precision in ("fp32", "bf16") for stage in (1, 2, 3))]


@pytest.mark.parametrize(
    ("precision", "stage"),
    [("fp32", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3), *(pytest.param("fp32", stage, marks=pytest.mark.slow) for stage in (1, 2, 3))],
)
def test_memory_matches_zeros_formula(precision, stage):
    for measured in spmd(measure, 2, MODEL, precision, ParallelConfig(zero=stage), "adamw"):
        assert_matches_formula(measured)


def measure_with_a_copy(precision: Precision) -> Measurement:
    return measure(MODEL, precision, ParallelConfig(), "adamw", copied=True)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_an_extra_copy_of_the_weights_is_detected(precision):
    with pytest.raises(AssertionError):
        assert_matches_formula(spmd(measure_with_a_copy, 2, precision)[0])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("precision", "stage"), CELLS)
def test_memory_of_four_ranks_matches_zeros_formula(precision, stage, optimizer):
    for measured in spmd(measure, 4, MODEL, precision, ParallelConfig(zero=stage), optimizer):
        assert_matches_formula(measured)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [ParallelConfig(tensor=2), ParallelConfig(sequence=2, zero=2)], ids=str)
def test_memory_under_tensor_and_sequence_parallelism_matches_the_formula(parallel):
    for measured in spmd(measure, 4, MODEL, "bf16", parallel, "adamw"):
        assert_matches_formula(measured)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memory_under_expert_parallelism_matches_the_formula(stage):
    for measured in spmd(measure, 4, MIXTURE, "bf16", ParallelConfig(expert=2, zero=stage), "adamw"):
        assert_matches_formula(measured)


def layout(ranks: int = 4, **sizes) -> Layout:
    return Layout(**{"data": ranks, "micro_batch": 1} | sizes)


@pytest.mark.parametrize(("stage", "bytes_"), [(0, 16 * P), (1, 4 * P + 12 * P // 4), (2, 2 * P + 14 * P // 4), (3, 16 * P // 4)])
def test_sixteen_bit_precisions_follow_the_papers_formula(stage, bytes_):
    assert estimate_memory(WEIGHTS, layout(zero=stage), "bf16", "adamw").total == bytes_


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast"])
@pytest.mark.parametrize(("stage", "bytes_"), [(0, 16 * P), (1, 8 * P + 12 * P // 4), (2, 4 * P + 16 * P // 4), (3, 20 * P // 4)])
def test_fp32_weights_have_a_master_copy_only_with_zero(stage, bytes_, precision):
    assert estimate_memory(WEIGHTS, layout(zero=stage), precision, "adamw").total == bytes_


def test_the_papers_example_of_7_5_billion_weights_on_64_ranks():
    """ZeRO, figure 1: 120 GB; 31.4, 16.6 and 1.9 GB in stages 1 to 3."""
    billions = {"w": (7_500_000_000,)}
    totals = [estimate_memory(billions, layout(64, zero=stage), "fp16", "adamw").total / 1e9 for stage in range(4)]
    assert [round(total, 1) for total in totals] == [120.0, 31.4, 16.6, 1.9]


def test_experts_are_partitioned_over_fewer_ranks():
    experts = {"blocks.0.mlp.experts.up_proj": (8, 64, 32)}
    size = 8 * 64 * 32
    memory = estimate_memory(experts, layout(zero=1, expert=2), "bf16", "adamw")
    assert (memory.weights, memory.masters) == (2 * size // 2, 4 * size // 2 // 2)


def test_tensor_ranks_share_the_weights_with_a_sharding_spec():
    memory = estimate_memory(WEIGHTS, layout(2, zero=1, tensor=2), "bf16", "sgd")
    assert memory.weights == 2 * (4096 * 256 // 2 + 256)
    assert memory.optimizer == memory.masters == memory.weights


def test_offloaded_state_counts_as_host_memory():
    memory = estimate_memory(WEIGHTS, layout(zero=2, offload=True), "bf16", "adamw")
    assert (memory.device, memory.host) == (2 * P + 2 * P // 4, 12 * P // 4)


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_match_the_optimizers_state(name):
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(2, 2))], OptimizerConfig(name=name))
    assert len(STATE_KEYS[type(optimizer)]) == MOMENTS[name]
