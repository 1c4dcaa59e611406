"""Tests that need a GPU. They are skipped on a machine without one.

MANTA_GPU_TESTS=cpu runs them on a CPU, to check the tests themselves.
"""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib import resources
from importlib.util import find_spec
from unittest.mock import patch

import parity
import pytest
import torch
import yaml
from parity import OPTIMIZERS, Cell, Difference, Trace, run_cell, run_plain

from manta.trainer.config.model import ExpertsConfig, ModelConfig
from manta.trainer.config.sections import OptimizerConfig, ParallelConfig, TrainConfig
from manta.trainer.dataloader.batch import Batch
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.engine.replica_check import sum_of_bits
from manta.trainer.model import losses
from manta.trainer.model.attention import AttentionMask, attend
from manta.trainer.model.build import build_model
from manta.trainer.model.dropout import AttentionDropout, Dropout, DropoutKeys, name_dropouts
from manta.trainer.model.losses import Criterion, cross_entropy
from manta.trainer.model.moe import MixtureOfExperts
from manta.trainer.parallel.fp8 import CAPABILITY

DEVICE = os.environ.get("MANTA_GPU_TESTS", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.timeout(900),  # kernels are compiled
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),  # the compiler's, about itself
]
# Kernels sum in a different order than a CPU: fp32 may differ by ten times its rounding error; bf16 and fp16 as between layouts.
BOUNDS = {
    "fp32": Difference(1e-5, 2e-4, 1e-3),
    "bf16-autocast": Difference(1e-3, 1e-2, 0.3),
    "bf16": Difference(3e-3, 1e-2, 0.3),
    "fp16": Difference(3e-3, 1e-2, 0.3),
    "fp8": Difference(3e-3, 3e-2, 0.3),  # with another accumulation, a mixture differs from itself by 9e-3 on a CPU
}
needs_hopper = pytest.mark.skipif(
    find_spec("torchao") is None or (DEVICE == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY),
    reason="no torchao, or a GPU older than Hopper",
)
FP8 = [pytest.param(Cell(name, 1, "fp8"), marks=needs_hopper) for name in ("wide", "gpt2", "moe")]
WIDE = {"heads": 4, "kv_heads": 2}  # heads wide enough for FlexAttention


def run_on(function, *args, device=DEVICE):
    """Run function(*args) in a new process with one rank on this device: DeepSpeed chooses its device once per process."""
    environment = {"DS_ACCELERATOR": device, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with patch.dict(os.environ, environment):
        try:
            return pool.submit(_joined, device, function, args).result(timeout=400)
        finally:  # also if it hangs
            for process in list(pool._processes.values()):
                process.kill()


def _joined(device, function, args):
    world = World.from_environment()
    assert world.device.type == device
    world.join()
    return function(*args)


def traced(cells, compiled) -> list[dict[str, Trace]]:
    parity.MODELS["wide"] = wide()
    return [{optimizer: run_cell(cell, optimizer, compiled=compiled) for optimizer in OPTIMIZERS} for cell in cells]


def wide() -> ModelConfig:
    return parity.MODELS["llama"].model_copy(update=WIDE)


def assert_close(value, expected, bound):
    """Compare by the relative norm of the difference."""
    value, expected = value.double().cpu(), expected.double()
    difference = (value - expected).norm() / expected.norm().clamp(min=1e-30)
    assert difference < bound, float(difference)


TRAINED = [
    Cell("wide", 1, "fp32"),
    Cell("wide", 1, "bf16"),
    Cell("wide", 1, "bf16-autocast"),
    *FP8,
    Cell("wide", 1, "bf16", ParallelConfig(zero=3), "full"),
    Cell("llama", 1, "fp16"),
    Cell("llama", 1, "bf16", ParallelConfig(offload=True)),
    Cell("gpt2", 1, "fp32", ParallelConfig(zero=0)),
    Cell("gpt2", 1, "bf16-autocast", checkpointing="selective"),
    Cell("bert", 1, "bf16", ParallelConfig(zero=2)),
    Cell("moe", 1, "fp32"),
    Cell("moe", 1, "bf16"),
    Cell("gpt2-moe", 1, "bf16-autocast"),
]


@pytest.mark.parametrize("cell", TRAINED, ids=str)
def test_a_gpu_trains_like_a_cpu(cell, monkeypatch):
    monkeypatch.setitem(parity.MODELS, "wide", wide())
    assert cell.refusal is None
    for optimizer, trace in run_on(traced, [cell], False)[0].items():
        assert trace.difference(run_plain(cell.model, cell.precision, optimizer)).within(BOUNDS[cell.precision])


COMPILED = [
    Cell("wide", 1, "fp32"),
    *FP8,
    Cell("wide", 1, "bf16"),
    Cell("gpt2", 1, "fp32", checkpointing="selective"),
    Cell("bert", 1, "bf16", checkpointing="full"),
    Cell("moe", 1, "fp32"),
    Cell("moe", 1, "bf16-autocast"),
]


@pytest.mark.parametrize("cell", COMPILED, ids=str)
def test_compiled_blocks_train_like_eager_ones(cell):
    compiled, eager = run_on(traced, [cell], True)[0], run_on(traced, [cell], False)[0]
    for optimizer in OPTIMIZERS:
        assert compiled[optimizer].difference(eager[optimizer]).within(BOUNDS[cell.precision])


def overflowing() -> tuple[list[bool], list[float | None]]:
    """Take two steps. Before the second the loss scale exceeds fp16's range."""
    world, layout = World.from_environment(), layout_for(TrainConfig(steps=2, global_batch=16, micro_batch=4), ParallelConfig(), 1)
    config = parity.optimizer_config("adamw")
    engine = Engine(parity.model("llama"), mesh=world.mesh(layout), optimizer=config, precision="fp16")
    skipped, scales = [], []
    for step in range(2):
        if step == 1:
            engine.zero_optimizer.loss_scaler.cur_scale = 2.0**40
        whole = parity.batch("llama", step)
        batches = [
            parity.rows(whole, layout.samples_of_rank(first=0, micro_step=micro_step, rank=0))
            for micro_step in range(len(whole.tokens) // layout.micro_batch)
        ]
        skipped.append(engine.step(batches, learning_rate=1e-3).skipped)
        scales.append(engine.loss_scale)
    return skipped, scales


def test_a_step_that_overflows_in_fp16_is_skipped():
    skipped, scales = run_on(overflowing)
    assert skipped == [False, True]
    assert scales[0] == 2.0**16


def compute_times_and_bit_sums() -> tuple[list[float], int, int]:
    """Return the compute times of three steps, and the sum of a weight's bits on the device and on the CPU."""
    world, layout = World.from_environment(), layout_for(TrainConfig(steps=3, global_batch=16, micro_batch=4), ParallelConfig(), 1)
    engine = Engine(parity.model("llama"), mesh=world.mesh(layout), optimizer=parity.optimizer_config("adamw"), precision="bf16")
    seconds = []
    for step in range(3):
        whole = parity.batch("llama", step)
        batches = [
            parity.rows(whole, layout.samples_of_rank(first=0, micro_step=micro_step, rank=0))
            for micro_step in range(len(whole.tokens) // layout.micro_batch)
        ]
        engine.step(batches, learning_rate=1e-3)
        seconds.append(engine.compute_timer.take_seconds())
    weight = engine.module.embedding.weight
    return seconds, int(sum_of_bits(weight)), int(sum_of_bits(weight.cpu()))


def test_compute_time_arrives_a_step_late_and_bit_sums_match():
    (first, *later), on_device, on_cpu = run_on(compute_times_and_bit_sums)
    assert (first == 0) == (DEVICE == "cuda")
    assert all(0 < seconds < 60 for seconds in later)
    assert on_device == on_cpu


MASKS = [(causal, window, documents) for causal in (True, False) for window in (None, 50) for documents in (False, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("causal", "window", "documents"), MASKS)
def test_attention_equals_a_cpus(causal, window, documents, dtype):
    generator = torch.Generator().manual_seed(0)
    B, T, N, K, H = 2, 300, 4, 2, 32  # more than MATMUL_LIMIT, and no multiple of FlexAttention's block size
    shapes = (B, N, T, H), (B, K, T, H), (B, K, T, H), (B, N, T, H)
    *inputs, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    numbers = torch.tensor([[0] * 100 + [1] * 180 + [-1] * 20, [0] * 300]) if documents else None

    def run(device, dtype):
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        mask = AttentionMask(
            T, T, torch.device(device), causal=causal, window=window, documents=None if numbers is None else numbers.to(device)
        )
        mask.prepare(dropout=False)
        for _ in range(2):  # as two layers: the second reuses the first's mask
            out = attend(*leaves, mask)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(device, dtype))

    bound = 1e-4 if dtype == torch.float32 else 1e-2
    for result, expected in zip(run(DEVICE, dtype), run("cpu", torch.float32), strict=True):
        assert_close(result, expected, bound)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("tokens", [64, 1])
def test_a_mixture_with_an_unused_expert_equals_a_cpus(tokens, precision):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    mixture = MixtureOfExperts(64, ExpertsConfig(experts=8, top_k=2, width=96, shared=1)).to(dtype)
    with torch.no_grad():
        mixture.router.weight.normal_()
        mixture.router.weight[5] = -10.0  # all inputs are positive: no token chooses it
    x_BTD = torch.rand(2, tokens, 64).to(dtype)

    def run(device):
        moved = mixture.to(device)
        leaf = x_BTD.to(device).requires_grad_()
        moved.router.load.zero_()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
            y_BTD, sums = moved(leaf)
        load = moved.router.load.cpu()
        grads = torch.autograd.grad([y_BTD.sum(), sums.sum()], [leaf, *moved.parameters()])
        return load, [y_BTD.detach().cpu(), sums.detach().cpu(), *(grad.cpu() for grad in grads)]

    expected_load, expected = run("cpu")
    load, results = run(DEVICE)
    assert torch.equal(load, expected_load)
    assert load.sum() == 2 * 2 * tokens
    assert load[5] == 0
    for value, expected_value in zip(results, expected, strict=True):
        assert_close(value, expected_value, 1e-4 if precision == "fp32" else 2e-2)
    experts = dict(zip(["x", *(name for name, _ in mixture.named_parameters())], results[2:], strict=True))
    for name in ("gate", "up", "down"):
        assert (experts[f"experts.{name}_proj"][5] == 0).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_has_the_same_mask_as_on_a_cpu(compiled):
    class Parts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.weights = Dropout(0.1), AttentionDropout(0.3)
            name_dropouts(self)

        def forward(self, x_BTD, weights_BNTS, keys):
            return self.hidden(x_BTD, keys), self.weights(weights_BNTS, keys)

    keys_B, positions_BT = torch.tensor([5, -(2**62)]), torch.arange(70).expand(2, -1)
    inputs = torch.ones(2, 70, 48), torch.ones(2, 4, 70, 70)
    expected = Parts()(*inputs, DropoutKeys(keys_B, positions_BT))
    parts = Parts().to(DEVICE)
    if compiled and DEVICE == "cuda":
        parts.compile()
    results = parts(*(x.to(DEVICE) for x in inputs), DropoutKeys(keys_B.to(DEVICE), positions_BT.to(DEVICE)))
    for result, expected_result in zip(results, expected, strict=True):
        assert torch.equal(result.cpu() == 0, expected_result == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_loss_equals_a_cpus(dtype, monkeypatch):
    monkeypatch.setitem(losses.CHUNK, DEVICE, 2**16)  # several chunks on both
    generator = torch.Generator().manual_seed(0)
    x_ND, weight_VD, bias_V = (torch.randn(shape, generator=generator).mul_(0.3).to(dtype) for shape in ((900, 64), (512, 64), (512,)))
    targets_N = torch.randint(0, 500, (900,), generator=generator)
    targets_N[::7] = -100

    def run(device):
        leaves = [x.to(device).requires_grad_() for x in (x_ND, weight_VD, bias_V)]
        criterion = Criterion(vocabulary=500, soft_cap=5.0, smoothing=0.1, z_weight=1e-3)
        objective, z = cross_entropy(leaves[0], leaves[1], targets_N.to(device), criterion, bias_V=leaves[2])
        return objective.detach(), z, *torch.autograd.grad(objective, leaves)

    for result, expected in zip(run(DEVICE), run("cpu"), strict=True):
        assert_close(result, expected, 1e-5 if dtype == torch.float32 else 2e-2)


def two_steps(preset, changes, compiled) -> tuple[list[float], list[float]]:
    """Return losses and gradient norms of a preset, on random tokens."""
    text = (resources.files("manta.launch.presets") / f"{preset}.yaml").read_text()
    config = ModelConfig(**yaml.safe_load(text) | changes)
    vocabulary, length = (50257, 512) if torch.cuda.is_available() else (500, 64)
    world, train = World.from_environment(), TrainConfig(steps=2, global_batch=4, micro_batch=2)
    layout = layout_for(train, ParallelConfig(), 1)
    built = build_model(config, vocabulary=vocabulary, sequence_length=length)
    built.initialize(1)
    optimizer = OptimizerConfig(learning_rate=1e-4)
    engine = Engine(
        built, mesh=world.mesh(layout), optimizer=optimizer, precision="bf16", checkpointing="selective", compile_blocks=compiled
    )
    generator = torch.Generator().manual_seed(0)
    text_BT = torch.randint(0, vocabulary, (4, length + 1), generator=generator)
    tokens, targets = text_BT[:, :-1].contiguous(), text_BT[:, 1:].contiguous()
    documents = (torch.arange(length) >= length // 3).long().expand_as(tokens).contiguous()
    positions = torch.arange(length).expand_as(tokens)
    whole = Batch(tokens=tokens, targets=targets, positions=positions, keys=torch.arange(4), documents=documents)
    if config.family == "bert":
        whole = replace(whole, segments=documents, next_sentence=torch.tensor([0, 1, 1, 0]))
    results = []
    for _ in range(2):
        batches = [
            parity.rows(whole, layout.samples_of_rank(first=0, micro_step=micro_step, rank=0))
            for micro_step in range(len(whole.tokens) // layout.micro_batch)
        ]
        result = engine.step(batches, learning_rate=1e-4)
        sums, counts = engine.evaluate(batches[0])
        assert torch.isfinite(sums).all()
        assert (counts > 0).all()
        results.append((engine.loss(result.terms.tolist()), result.grad_norm))
    return tuple(map(list, zip(*results, strict=True)))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("gpt2-124m", {"layers": 3}),
        ("llama-1b", {"layers": 3, "sliding_window": 200}),
        ("bert-base", {"layers": 3}),
        ("moe-8x", {"layers": 2}),
    ],
)
def test_a_preset_learns_on_one_gpu(preset, changes, compiled):
    if DEVICE == "cpu":
        changes = changes | {"layers": 1, "width": 256, "heads": 8}
    losses, norms = run_on(two_steps, preset, changes, compiled and DEVICE == "cuda")
    assert losses[1] < losses[0]
    assert all(norm > 0 for norm in norms)


def test_one_gpu_trains_the_124m_preset_with_the_same_command(workspace):
    overrides = ["model={preset: gpt2-124m}", "precision=bf16", "train.steps=6", "schedule.warmup_steps=2", "cluster={}"]
    done = workspace.manta("train", str(workspace.config_file), "run.dir=on a gpu", *overrides, timeout=280, DS_ACCELERATOR=DEVICE)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(text) for text in (workspace.directory / "on a gpu/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert lines[-1]["memory/peak"] > 124e6 * 2


def test_a_gpu_run_comes_back_from_its_checkpoint(workspace):
    for command in (
        [
            "train",
            str(workspace.config_file),
            "run.dir=gpu again",
            "precision=bf16",
            "train.steps=12",
            "cluster={}",
            "schedule.shape=constant",
        ],
        ["resume", "gpu again", "train.steps=18"],
    ):
        done = workspace.manta(*command, timeout=280, DS_ACCELERATOR=DEVICE)
        assert done.returncode == 0, done.stderr
    assert json.loads((workspace.directory / "gpu again/metrics.jsonl").read_text().splitlines()[-1])["step"] == 18
