"""What only a GPU can show. On a machine without one these skip, and say so.

MANTA_GPU_TESTS=cpu runs them with a CPU in the GPU's place: to see that they run at all.
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
# Kernels sum in another order than a CPU's: fp32 moves by its rounding, ten times over; bf16 and fp16 as between layouts.
BOUNDS = {
    "fp32": Difference(1e-5, 2e-4, 1e-3),
    "bf16-autocast": Difference(1e-3, 1e-2, 0.3),
    "bf16": Difference(3e-3, 1e-2, 0.3),
    "fp16": Difference(3e-3, 1e-2, 0.3),
    "fp8": Difference(3e-3, 3e-2, 0.3),  # a mixture on a CPU is 9e-3 from itself, accumulated otherwise
}
needs_hopper = pytest.mark.skipif(
    find_spec("torchao") is None or (DEVICE == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY),
    reason="no torchao, or a GPU older than Hopper",
)
FP8 = [pytest.param(Cell(name, 1, "fp8"), marks=needs_hopper) for name in ("wide", "gpt2", "moe")]
WIDE = {"heads": 4, "kv_heads": 2}  # heads wide enough for FlexAttention


def apart(function, *args, device=DEVICE):
    """function(*args) in a process of its own, whose one rank sees this device: DeepSpeed chooses once a process."""
    own = {"DS_ACCELERATOR": device, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    if device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with patch.dict(os.environ, own):
        try:
            return pool.submit(_joined, device, function, args).result(timeout=400)
        finally:  # also where it hangs
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


def near(got, wanted, bound):
    """By the norm of the difference."""
    got, wanted = got.double().cpu(), wanted.double()
    difference = (got - wanted).norm() / wanted.norm().clamp(min=1e-30)
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
def test_a_gpu_trains_as_a_cpu_does(cell, monkeypatch):
    monkeypatch.setitem(parity.MODELS, "wide", wide())
    assert cell.refusal is None
    for optimizer, trace in apart(traced, [cell], False)[0].items():
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
def test_compiled_blocks_train_as_others_do(cell):
    ours, theirs = apart(traced, [cell], True)[0], apart(traced, [cell], False)[0]
    for optimizer in OPTIMIZERS:
        assert ours[optimizer].difference(theirs[optimizer]).within(BOUNDS[cell.precision])


def overflowing() -> tuple[list[bool], list[float | None]]:
    """Two steps: before the second the loss scale is set beyond what fp16 holds."""
    world, layout = World.from_environment(), layout_for(TrainConfig(steps=2, global_batch=16, micro_batch=4), ParallelConfig(), 1)
    config = parity.optimizer_config("adamw")
    engine = Engine(parity.model("llama"), mesh=world.mesh(layout), optimizer=config, precision="fp16")
    skipped, scales = [], []
    for step in range(2):
        if step == 1:
            engine.zero_optimizer.loss_scaler.cur_scale = 2.0**40
        whole = parity.batch("llama", step)
        taken = [parity.rows(whole, layout.samples(first=0, turn=turn, rank=0)) for turn in range(len(whole.tokens) // layout.micro_batch)]
        skipped.append(engine.step(taken, learning_rate=1e-3).skipped)
        scales.append(engine.loss_scale)
    return skipped, scales


def test_a_step_that_overflows_in_fp16_is_left_out():
    skipped, scales = apart(overflowing)
    assert skipped == [False, True]
    assert scales[0] == 2.0**16


def looked_at() -> tuple[list[float], int, int]:
    """What a rank spends by itself, over three steps; and the sum of a weight's bits, there and on the CPU."""
    world, layout = World.from_environment(), layout_for(TrainConfig(steps=3, global_batch=16, micro_batch=4), ParallelConfig(), 1)
    engine = Engine(parity.model("llama"), mesh=world.mesh(layout), optimizer=parity.optimizer_config("adamw"), precision="bf16")
    work = []
    for step in range(3):
        whole = parity.batch("llama", step)
        taken = [parity.rows(whole, layout.samples(first=0, turn=turn, rank=0)) for turn in range(len(whole.tokens) // layout.micro_batch)]
        engine.step(taken, learning_rate=1e-3)
        work.append(engine.compute_timer.take_seconds())
    weight = engine.module.embedding.weight
    return work, int(sum_of_bits(weight)), int(sum_of_bits(weight.cpu()))


def test_a_rank_s_own_time_is_known_a_step_later_and_bits_sum_to_the_same_there():
    (first, *later), there, here = apart(looked_at)
    assert (first == 0) == (DEVICE == "cuda")
    assert all(0 < seconds < 60 for seconds in later)
    assert there == here


ATTENDED = [(causal, window, documents) for causal in (True, False) for window in (None, 50) for documents in (False, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("causal", "window", "documents"), ATTENDED)
def test_attention_sees_what_it_sees_on_a_cpu(causal, window, documents, dtype):
    generator = torch.Generator().manual_seed(0)
    B, T, N, K, H = 2, 300, 4, 2, 32  # beyond a CPU's plain products, and no multiple of a block of FlexAttention's
    shapes = (B, N, T, H), (B, K, T, H), (B, K, T, H), (B, N, T, H)
    *inputs, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    cuts = torch.tensor([[0] * 100 + [1] * 180 + [-1] * 20, [0] * 300]) if documents else None

    def run(device, dtype):
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        mask = AttentionMask(T, T, torch.device(device), causal=causal, window=window, documents=None if cuts is None else cuts.to(device))
        mask.prepare(dropout=False)
        for _ in range(2):  # as two layers: the second reuses the first's mask
            out = attend(*leaves, mask)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(device, dtype))

    bound = 1e-4 if dtype == torch.float32 else 1e-2
    for got, wanted in zip(run(DEVICE, dtype), run("cpu", torch.float32), strict=True):
        near(got, wanted, bound)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("tokens", [64, 1])
def test_a_mixture_is_what_it_is_on_a_cpu_though_an_expert_has_no_token(tokens, precision):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    mixture = MixtureOfExperts(64, ExpertsConfig(experts=8, top_k=2, width=96, shared=1)).to(dtype)
    with torch.no_grad():
        mixture.router.weight.normal_()
        mixture.router.weight[5] = -10.0  # and all inputs are positive: nobody chooses it
    x_BTD = torch.rand(2, tokens, 64).to(dtype)

    def run(device):
        there = mixture.to(device)
        leaf = x_BTD.to(device).requires_grad_()
        there.router.load.zero_()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
            y_BTD, sums = there(leaf)
        load = there.router.load.cpu()
        grads = torch.autograd.grad([y_BTD.sum(), sums.sum()], [leaf, *there.parameters()])
        return load, [y_BTD.detach().cpu(), sums.detach().cpu(), *(grad.cpu() for grad in grads)]

    wanted_load, wanted = run("cpu")
    load, got = run(DEVICE)
    assert torch.equal(load, wanted_load)
    assert load.sum() == 2 * 2 * tokens
    assert load[5] == 0
    for ours, theirs in zip(got, wanted, strict=True):
        near(ours, theirs, 1e-4 if precision == "fp32" else 2e-2)
    experts = dict(zip(["x", *(name for name, _ in mixture.named_parameters())], got[2:], strict=True))
    for name in ("gate", "up", "down"):
        assert (experts[f"experts.{name}_proj"][5] == 0).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_drops_the_same_on_a_gpu_as_on_a_cpu(compiled):
    class Parts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.weights = Dropout(0.1), AttentionDropout(0.3)
            name_dropouts(self)

        def forward(self, x_BTD, weights_BNTS, noise):
            return self.hidden(x_BTD, noise), self.weights(weights_BNTS, noise)

    keys_B, positions_BT = torch.tensor([5, -(2**62)]), torch.arange(70).expand(2, -1)
    inputs = torch.ones(2, 70, 48), torch.ones(2, 4, 70, 70)
    wanted = Parts()(*inputs, DropoutKeys(keys_B, positions_BT))
    parts = Parts().to(DEVICE)
    if compiled and DEVICE == "cuda":
        parts.compile()
    got = parts(*(x.to(DEVICE) for x in inputs), DropoutKeys(keys_B.to(DEVICE), positions_BT.to(DEVICE)))
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours.cpu() == 0, theirs == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_is_that_of_a_cpu(dtype, monkeypatch):
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

    for got, wanted in zip(run(DEVICE), run("cpu"), strict=True):
        near(got, wanted, 1e-5 if dtype == torch.float32 else 2e-2)


def two_steps(preset, changes, compiled) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a preset, on random tokens."""
    text = (resources.files("manta.launch.presets") / f"{preset}.yaml").read_text()
    config = ModelConfig(**yaml.safe_load(text) | changes)
    vocabulary, length = (50257, 512) if torch.cuda.is_available() else (500, 64)
    world, train = World.from_environment(), TrainConfig(steps=2, global_batch=4, micro_batch=2)
    layout = layout_for(train, ParallelConfig(), 1)
    made = build_model(config, vocabulary=vocabulary, sequence_length=length)
    made.initialize(1)
    optimizer = OptimizerConfig(learning_rate=1e-4)
    engine = Engine(
        made, mesh=world.mesh(layout), optimizer=optimizer, precision="bf16", checkpointing="selective", compile_blocks=compiled
    )
    generator = torch.Generator().manual_seed(0)
    text_BT = torch.randint(0, vocabulary, (4, length + 1), generator=generator)
    tokens, targets = text_BT[:, :-1].contiguous(), text_BT[:, 1:].contiguous()
    documents = (torch.arange(length) >= length // 3).long().expand_as(tokens).contiguous()
    positions = torch.arange(length).expand_as(tokens)
    whole = Batch(tokens=tokens, targets=targets, positions=positions, keys=torch.arange(4), documents=documents)
    if config.family == "bert":
        whole = replace(whole, segments=documents, next_sentence=torch.tensor([0, 1, 1, 0]))
    told = []
    for _ in range(2):
        taken = [parity.rows(whole, layout.samples(first=0, turn=turn, rank=0)) for turn in range(len(whole.tokens) // layout.micro_batch)]
        outcome = engine.step(taken, learning_rate=1e-4)
        sums, counts = engine.evaluate(taken[0])
        assert torch.isfinite(sums).all()
        assert (counts > 0).all()
        told.append((engine.loss(outcome.terms.tolist()), outcome.grad_norm))
    return tuple(map(list, zip(*told, strict=True)))


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
    losses, norms = apart(two_steps, preset, changes, compiled and DEVICE == "cuda")
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
