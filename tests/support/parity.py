"""Parity: a model under a layout and in a precision computes the same as one plain PyTorch process. Each combination is a cell.

A cell takes ten optimizer steps under SGD and AdamW, with clipped and accumulated gradients, and with padding and masks that differ between
ranks and micro batches. Compared are every step's loss and gradient norm, and each weight's movement after the last step: a norm over all
weights would hide a small weight.
"""

import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from manta.trainer.checkpoint.engine_state import logical_shapes, logical_state
from manta.trainer.config.model import ExpertsConfig, ModelConfig
from manta.trainer.config.sections import OptimizerConfig, ParallelConfig, Precision, TrainConfig
from manta.trainer.config.supported import unsupported
from manta.trainer.dataloader.batch import IGNORED, Batch
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine import deepspeed as engines
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.model.build import build_model
from manta.trainer.model.transformer import Transformer
from manta.trainer.optim.optimizers import build_optimizer
from manta.trainer.parallel.fp8 import convert_to_fp8

VOCABULARY, LENGTH, STEPS, SEED = 250, 32, 10, 7
GLOBAL_BATCH, ACCUMULATION = 16, 2  # every layout accumulates two micro batches
EPSILON = {"fp32": 1e-5}  # AdamW's; in 16 bits 1e-4, above the rounding error of a gradient
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}  # of weights; fp32 in other precisions
OPTIMIZERS = ("adamw", "sgd")
RATES = {"adamw": 3e-3, "sgd": 0.3}
DECAY = {"adamw": 0.1, "sgd": 0.0}  # decay would hide the effect of small gradients under SGD
NO_GRADIENT = re.compile(r".*\.k_proj\.bias")  # softmax is invariant to it: its gradient is only rounding error

BUCKET = 10_000  # elements; the models have 100,000 and more
DEFAULT_CONFIG = engines.deepspeed_config
LINEAR = torch.nn.functional.linear  # ZeRO-3 repositions it for the rest of the process

SIZES: dict[str, Any] = {"layers": 2, "width": 64, "heads": 8, "mlp_width": 128}
MIXTURE = ExpertsConfig(experts=4, top_k=2, width=64, shared=1)
MODELS = {
    "gpt2": ModelConfig(family="gpt2", dropout=0.1, attention_dropout=0.1, **SIZES),
    "llama": ModelConfig(
        kv_heads=4,
        qk_norm=True,
        logit_soft_cap=20.0,
        sliding_window=8,
        tied_head=False,
        label_smoothing=0.1,
        z_loss=1e-3,
        **SIZES,
    ),
    "bert": ModelConfig(family="bert", dropout=0.1, attention_dropout=0.1, z_loss=1e-3, **SIZES),
    "moe": ModelConfig(kv_heads=4, experts=MIXTURE, **SIZES),
    "gpt2-moe": ModelConfig(
        family="gpt2",
        experts=MIXTURE.model_copy(update={"shared": 0, "score": "sigmoid", "balance": "bias", "bias_update_speed": 0.01}),
        **SIZES,
    ),
}


@dataclass(frozen=True)
class Cell:
    model: str
    ranks: int
    precision: Precision = "fp32"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpointing: str = "none"

    def __str__(self) -> str:
        options = self.parallel.model_dump(exclude_defaults=True)
        layout = " ".join(f"{key}={value}" for key, value in options.items()) or "zero=1"
        checkpointing = "" if self.checkpointing == "none" else f" checkpointing={self.checkpointing}"
        return f"{self.model} {self.precision} {self.ranks} ranks {layout}{checkpointing}"

    @property
    def refusal(self) -> str | None:
        train = TrainConfig(steps=STEPS, global_batch=1, micro_batch=1, activation_checkpointing=self.checkpointing)
        errors = unsupported(MODELS[self.model], self.parallel, self.precision, train, lengths=[LENGTH])
        return next(map(str, errors), None)


@dataclass(frozen=True)
class Difference:
    """Relative differences: the largest of any step's loss and gradient norm and of any weight's movement, with that weight's name."""

    loss: float
    norm: float
    weight: float
    worst_weight: str = ""

    def within(self, bounds: "Difference") -> bool:
        return self.loss <= bounds.loss and self.norm <= bounds.norm and self.weight <= bounds.weight

    def __str__(self) -> str:
        return f"{self.loss:.0e} / {self.norm:.0e} / {self.weight:.0e}"


BOUNDS = {
    "fp32": Difference(2e-6, 2e-5, 3e-4),
    "bf16-autocast": Difference(3e-4, 3e-3, 0.3),
    "bf16": Difference(3e-3, 3e-3, 0.3),
    "fp16": Difference(3e-3, 3e-3, 0.3),
    "fp8": Difference(3e-3, 1e-2, 0.3),
}


@dataclass(frozen=True)
class Trace:
    losses: list[float]
    norms: list[float]
    movements: dict[str, Any]  # by weight, after the last step, as numpy arrays, which are cheap to send between processes
    drifted: list[str] = field(default_factory=list)  # names of weights with different replicas

    def difference(self, other: "Trace") -> Difference:
        loss, norm = (
            max(abs(a - b) / abs(b) for a, b in zip(values, others, strict=True))
            for values, others in ((self.losses, other.losses), (self.norms, other.norms))
        )
        assert self.movements.keys() == other.movements.keys()
        weights = {
            name: _relative_difference(self.movements[name], movement)
            for name, movement in other.movements.items()
            if not NO_GRADIENT.fullmatch(name)
        }
        weights |= dict.fromkeys(self.drifted, math.inf)
        worst_weight = max(weights, key=weights.__getitem__)
        return Difference(loss, norm, weights[worst_weight], worst_weight)


def _relative_difference(value: Any, reference: Any) -> float:
    return float(((value - reference) ** 2).sum() ** 0.5 / (reference**2).sum() ** 0.5)


def model(name: str) -> Transformer:
    """Return a model with a run's initial weights, but for two differences: larger queries and keys, so that attention is not uniform and
    has gradients worth comparing; and random vectors, so that a bias that is added twice or never makes a difference.
    """
    built = build_model(MODELS[name], vocabulary=VOCABULARY, sequence_length=LENGTH)
    built.initialize(seed=SEED)
    for number, (weight, parameter) in enumerate(built.named_parameters()):
        if weight.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data *= 5
        if parameter.ndim < 2:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1
    return built


def optimizer_config(name: str, precision: Precision = "fp32") -> OptimizerConfig:
    """Return settings that clip every gradient. If a gradient is only rounding error, AdamW takes a full step in an arbitrary direction
    unless epsilon is larger. SGD does not, and it reveals errors of scale.
    """
    return OptimizerConfig(
        name=name, learning_rate=RATES[name], gradient_clipping=0.25, epsilon=EPSILON.get(precision, 1e-4), weight_decay=DECAY[name]
    )


def batch(name: str, step: int) -> Batch:
    """Return the global batch of a step, with documents, and with padding of a different length in each sequence."""
    random = torch.Generator().manual_seed(step)
    shape = (GLOBAL_BATCH, LENGTH)
    text = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, LENGTH + 1), generator=random)
    tokens, positions = text[:, :-1].contiguous(), torch.arange(LENGTH).expand(shape)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (GLOBAL_BATCH, 1), generator=random)
    documents = (positions >= LENGTH // 4).long().masked_fill(positions >= lengths, -1)
    common: dict[str, Any] = {"positions": positions, "keys": torch.arange(GLOBAL_BATCH) + step * 1000}
    if MODELS[name].family == "bert":
        chosen = (torch.rand(shape, generator=random) < 0.2) & (positions < lengths)
        follows = torch.randint(0, 2, (GLOBAL_BATCH,), generator=random)
        tokens = tokens.masked_fill(chosen, VOCABULARY - 1)
        return Batch(
            tokens=tokens,
            targets=text[:, :-1].where(chosen, IGNORED),
            documents=documents.clamp(max=0),
            segments=(positions > LENGTH // 2).long(),
            next_sentence=follows,
            **common,
        )
    return Batch(tokens=tokens, targets=text[:, 1:].masked_fill(positions >= lengths, IGNORED), documents=documents, **common)


def rows(whole: Batch, numbers: Any) -> Batch:
    """Return these sequences of a batch."""
    names = ("tokens", "targets", "positions", "keys", "documents", "segments", "next_sentence")
    tensors = {name: getattr(whole, name) for name in names}
    return replace(whole, **{name: tensor[torch.as_tensor(numbers)] for name, tensor in tensors.items() if tensor is not None})


@torch.no_grad()
def movements(name: str, precision: Precision, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return how far each weight has moved from its initial value, which was rounded to the training precision."""
    initial = model(name).to(DTYPES.get(precision, torch.float32)).float()
    return {key: (weights[key] - weight).numpy() for key, weight in initial.named_parameters()}


def run_plain(name: str, precision: Precision, optimizer: str, accumulation: int = ACCUMULATION) -> Trace:
    """Train in one process without DeepSpeed: fp32 masters beside a model in training precision, which also accumulates the gradients.

    accumulation: micro batches per step.
    """
    trained = model(name).to(DTYPES.get(precision, torch.float32))
    masters = model(name)
    masters.load_state_dict({key: weight.float() for key, weight in trained.state_dict().items()})
    if precision == "fp8":
        for block in trained.blocks:
            convert_to_fp8(block, emulate=True)
    config = optimizer_config(optimizer, precision)
    steps = build_optimizer(masters.parameters(), config)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-autocast" else nullcontext()
    scale = 2.0**16 if precision == "fp16" else 1.0
    losses, norms = [], []
    for step in range(STEPS):
        trained.zero_grad()
        whole = batch(name, step)
        counts = trained.counts(whole).float().clamp(min=1)
        loss = 0.0
        for chunk in torch.arange(GLOBAL_BATCH).chunk(accumulation):
            with autocast:
                terms = trained(rows(whole, chunk), counts)
            (terms.sum() * scale).backward()
            loss += float(terms.detach().sum())
        for master, weight in zip(masters.parameters(), trained.parameters(), strict=True):
            master.grad = weight.grad.float() / scale
        losses.append(loss)
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.parameters(), config.gradient_clipping)))
        steps.step()
        for _, router in trained.routers():
            router.end_step(router.load.float())
        with torch.no_grad():
            for master, weight in zip(masters.parameters(), trained.parameters(), strict=True):
                weight.copy_(master)
    return Trace(losses, norms, movements(name, precision, dict(masters.named_parameters())))


def run_plain_cells(cells: list[tuple[str, Precision]], accumulation: int = ACCUMULATION) -> dict[tuple[str, Precision, str], Trace]:
    return {
        (name, precision, optimizer): run_plain(name, precision, optimizer, accumulation)
        for name, precision in cells
        for optimizer in OPTIMIZERS
    }


def small_buckets(*args: Any) -> dict[str, Any]:
    """Return DeepSpeed's config with small buffers, so that it treats small models like large ones: gradients fill many buckets, and ZeRO-3
    keeps only the smallest weights whole, partitions the others, and gathers them for each layer.
    """
    config = DEFAULT_CONFIG(*args)
    config["zero_optimization"] |= {
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "sub_group_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_live_parameters": 2 * BUCKET,
        "stage3_param_persistence_threshold": SIZES["width"],
    }
    return config


def gather_masters(engine: Engine) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return every master, whole, and the names of those with different replicas."""
    prefix = "master/"
    state, names = logical_state(engine), [name for name, _ in engine.module.named_parameters()]
    shapes = [logical_shapes(engine)[prefix + name] for name in names]
    sizes = list(map(math.prod, shapes))
    lowest, highest = torch.full((sum(sizes),), math.inf), torch.full((sum(sizes),), -math.inf)
    for flat in (lowest, highest):
        for name, shape, whole in zip(names, shapes, flat.split(sizes), strict=True):
            if (local := state.get(prefix + name)) is not None:
                for rectangle, view in local.views:
                    whole.view(shape)[rectangle.slices] = view
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    both = list(zip(names, shapes, lowest.split(sizes), highest.split(sizes), strict=True))
    return {name: low.view(shape) for name, shape, low, _ in both}, [name for name, _, low, high in both if not torch.equal(low, high)]


def run_cell(cell: Cell, optimizer: str, fault: Callable[[Engine], None] | None = None, *, compiled: bool = False) -> Trace:
    """Train this rank's part with DeepSpeed. fault: changes the engine, for a control."""
    torch.nn.functional.linear = LINEAR
    world = World.from_environment()
    data = world.size // (cell.parallel.tensor * cell.parallel.sequence)
    train = TrainConfig(steps=STEPS, global_batch=GLOBAL_BATCH, micro_batch=GLOBAL_BATCH // (ACCUMULATION * data))
    layout = layout_for(train, cell.parallel, world.size)
    mesh = world.mesh(layout)
    with patch.object(engines, "deepspeed_config", small_buckets):
        engine = Engine(
            model(cell.model),
            mesh=mesh,
            optimizer=optimizer_config(optimizer, cell.precision),
            precision=cell.precision,
            checkpointing=cell.checkpointing,
            compile_blocks=compiled,
        )
    if fault is not None:
        fault(engine)
    losses, norms = [], []
    for step in range(STEPS):
        whole = batch(cell.model, step)
        samples = [layout.samples_of_rank(first=0, micro_step=micro_step, rank=mesh.data_rank) for micro_step in range(ACCUMULATION)]
        result = engine.step([rows(whole, numbers) for numbers in samples], learning_rate=RATES[optimizer])
        assert not result.skipped
        terms = result.terms.double()
        dist.all_reduce(terms, group=mesh.replicas)
        losses.append(float(terms.sum()))
        norms.append(result.grad_norm)
    is_refused = layout.zero == 0 and cell.refusal is not None  # checkpoints do not support it; each rank holds all weights
    weights, drifted = (dict(engine.module.named_parameters()), []) if is_refused else gather_masters(engine)
    return Trace(losses, norms, movements(cell.model, cell.precision, weights), drifted)


def run_cells(cells: list[Cell]) -> list[dict[str, Trace]]:
    """Run cells with the same number of ranks, one after another in the same processes."""
    return [{optimizer: run_cell(cell, optimizer) for optimizer in OPTIMIZERS} for cell in cells]
