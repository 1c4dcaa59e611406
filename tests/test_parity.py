"""ZeRO-1 on two ranks is the mathematics of one plain PyTorch process: loss AND gradient norm, under SGD and AdamW."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from spmd import spmd

from manta.trainer.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
from manta.trainer.engine import Engine, Microbatch
from manta.trainer.layout import fits
from manta.trainer.model.gpt import GPT
from manta.trainer.optim import build_optimizer
from manta.trainer.world import World

MODEL = ModelConfig(layers=2, width=64, heads=4, kv_heads=2, mlp_width=128)
VOCABULARY, LENGTH, STEPS = 250, 32, 10
TRAIN = TrainConfig(steps=STEPS, global_batch=16, micro_batch=4)  # two ranks take two turns each
RATES = {"adamw": 3e-3, "sgd": 0.3}
LOSS_BOUND = {"fp32": 2e-6, "bf16": 3e-3}
NORM_BOUND = {"fp32": 2e-5, "bf16": 3e-3}


@dataclass(frozen=True)
class Trace:
    losses: list[float]
    norms: list[float]

    def differs(self, other: "Trace") -> tuple[float, float]:
        """The largest relative difference of loss and of norm."""
        return tuple(
            max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
            for ours, theirs in ((self.losses, other.losses), (self.norms, other.norms))
        )


def optimizer_config(name: str) -> OptimizerConfig:
    return OptimizerConfig(name=name, learning_rate=RATES[name], gradient_clipping=0.5)  # every gradient is clipped


def samples(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (TRAIN.global_batch, LENGTH + 1), generator=generator)


def microbatch(windows: torch.Tensor) -> Microbatch:
    return Microbatch(tokens=windows[:, :-1], targets=windows[:, 1:])


def build() -> GPT:
    model = GPT(MODEL, vocabulary=VOCABULARY)
    model.initialize(seed=7)
    return model


def plain(precision: Precision, optimizer: str) -> Trace:
    """One process, no DeepSpeed: fp32 masters beside a model in training precision, gradients accumulated in that precision."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = build().to(dtype)
    masters = build()
    masters.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    config = optimizer_config(optimizer)
    steps = build_optimizer(masters, config)
    losses, norms = [], []
    for step in range(STEPS):
        model.zero_grad()
        chunks = samples(step).split(TRAIN.micro_batch)
        loss = 0.0
        for windows in chunks:
            batch = microbatch(windows)
            part = model(batch.tokens, batch.targets) / len(chunks)
            part.backward()
            loss += float(part.detach())
        for master, weight in zip(masters.parameters(), model.parameters(), strict=True):
            master.grad = weight.grad.float()
        losses.append(loss)
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.parameters(), config.gradient_clipping)))
        steps.step()
        with torch.no_grad():
            for master, weight in zip(masters.parameters(), model.parameters(), strict=True):
                weight.copy_(master)
    return Trace(losses, norms)


@cache
def reference(precision: Precision, optimizer: str) -> Trace:
    return spmd(plain, 1, precision, optimizer)[0]


def under_zero(precision: Precision, optimizer: str, fault: str | None) -> Trace:
    """The same on this rank's share, in DeepSpeed; with a fault put in, where a control asks for one."""
    world = World.from_environment()
    layout = fits(TRAIN, world.size)
    model = build()
    engine = Engine(model, layout=layout, optimizer=optimizer_config(optimizer), precision=precision)
    if fault == "a gradient doubled":
        model.embedding.weight.register_hook(lambda gradient: gradient * 2)
    if fault == "the reduction left out":
        engine.zero.average_tensor = lambda *_, **__: None
    losses, norms = [], []
    for step in range(STEPS):
        taken = [layout.samples(step=0, turn=turn, rank=world.rank) for turn in range(layout.accumulation)]
        batches = [microbatch(samples(step)[torch.from_numpy(np.asarray(numbers))]) for numbers in taken]
        loss, norm = engine.step(batches, learning_rate=RATES[optimizer])
        torch.distributed.all_reduce(loss)
        losses.append(float(loss) / world.size)
        norms.append(norm)
    return Trace(losses, norms)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_zero_1_equals_one_plain_process(ranks, precision, optimizer):
    wanted = reference(precision, optimizer)
    for trace in spmd(under_zero, ranks, precision, optimizer, None):
        loss, norm = trace.differs(wanted)
        assert loss <= LOSS_BOUND[precision]
        assert norm <= NORM_BOUND[precision]


@pytest.mark.parametrize("fault", ["a gradient doubled", "the reduction left out"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_comparison_notices_a_fault(precision, optimizer, fault):
    wanted = reference(precision, optimizer)
    _, norm = spmd(under_zero, 2, precision, optimizer, fault)[0].differs(wanted)
    assert norm > NORM_BOUND[precision]
