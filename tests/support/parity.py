"""One proof, many cells: a model under a layout, in a precision, is the mathematics of one plain PyTorch process.

Each cell takes ten optimizer steps, gradients clipped and accumulated, padding and masks that differ between ranks and micro batches, under
SGD and AdamW. Compared are loss and gradient norm of every step, and how far each weight has moved after the last: a norm over all
says little of a small weight.
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
GLOBAL_BATCH, TURNS = 16, 2  # every layout accumulates two micro batches
EPSILON = {"fp32": 1e-5}  # of AdamW; in 16 bits 1e-4: above what rounding leaves of a gradient
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}  # of weights; of others fp32
OPTIMIZERS = ("adamw", "sgd")
RATES = {"adamw": 3e-3, "sgd": 0.3}
DECAY = {"adamw": 0.1, "sgd": 0.0}  # SGD's would hide what becomes of small gradients
SILENT = re.compile(r".*\.k_proj\.bias")  # softmax does not see it: its gradient is zero but for rounding

PIECES = 10_000  # weights, of 100,000 and more
SETTINGS = engines.deepspeed_config
LINEAR = torch.nn.functional.linear  # ZeRO-3 puts its own in this place, for all that run in the process after it

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
        given = self.parallel.model_dump(exclude_defaults=True)
        layout = " ".join(f"{key}={value}" for key, value in given.items()) or "zero=1"
        again = "" if self.checkpointing == "none" else f" recompute={self.checkpointing}"
        return f"{self.model} {self.precision} {self.ranks} ranks {layout}{again}"

    @property
    def refusal(self) -> str | None:
        model, checkpointing = MODELS[self.model], self.checkpointing
        errors = unsupported(model, self.parallel, self.precision, sequence_length=LENGTH, activation_checkpointing=checkpointing)
        return next(map(str, errors), None)


@dataclass(frozen=True)
class Difference:
    """Relative: the largest of any step's loss and norm; of how far a weight has moved in the end, and which weight is furthest off."""

    loss: float
    norm: float
    weight: float
    furthest: str = ""

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
    moved: dict[str, Any]  # how far each weight, in the end: of numpy, which goes from process to process as it is
    drifted: list[str] = field(default_factory=list)  # weights of which ranks that hold the same hold different values

    def differs(self, other: "Trace") -> Difference:
        loss, norm = (
            max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
            for ours, theirs in ((self.losses, other.losses), (self.norms, other.norms))
        )
        assert self.moved.keys() == other.moved.keys()
        ways = {name: _relative(self.moved[name], way) for name, way in other.moved.items() if not SILENT.fullmatch(name)}
        ways |= dict.fromkeys(self.drifted, math.inf)
        furthest = max(ways, key=ways.__getitem__)
        return Difference(loss, norm, ways[furthest], furthest)


def _relative(ours: Any, theirs: Any) -> float:
    return float(((ours - theirs) ** 2).sum() ** 0.5 / (theirs**2).sum() ** 0.5)


def model(name: str) -> Transformer:
    """Begun as a run begins, but for two things: queries and keys are so large that attention attends, and has gradients worth comparing;
    and no vector is 0 or 1 throughout, so that a bias that is added twice, or not at all, is felt.
    """
    made = build_model(MODELS[name], vocabulary=VOCABULARY, sequence_length=LENGTH)
    made.initialize(seed=SEED)
    for number, (weight, parameter) in enumerate(made.named_parameters()):
        if weight.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data *= 5
        if parameter.ndim < 2:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1
    return made


def optimizer_config(name: str, precision: Precision = "fp32") -> OptimizerConfig:
    """Every gradient is clipped. Of a gradient that is zero but for rounding AdamW makes a step of full size, in either direction, unless
    epsilon lies above that. SGD has no such thing, and sees each error of scale.
    """
    return OptimizerConfig(
        name=name, learning_rate=RATES[name], gradient_clipping=0.25, epsilon=EPSILON.get(precision, 1e-4), weight_decay=DECAY[name]
    )


def batch(name: str, step: int) -> Batch:
    """The global batch of a step: documents, and padding of another length in each sequence."""
    random = torch.Generator().manual_seed(step)
    shape = (GLOBAL_BATCH, LENGTH)
    text = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, LENGTH + 1), generator=random)
    tokens, places = text[:, :-1].contiguous(), torch.arange(LENGTH).expand(shape)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (GLOBAL_BATCH, 1), generator=random)
    documents = (places >= LENGTH // 4).long().masked_fill(places >= lengths, -1)
    common: dict[str, Any] = {"positions": places, "keys": torch.arange(GLOBAL_BATCH) + step * 1000}
    if MODELS[name].family == "bert":
        chosen = (torch.rand(shape, generator=random) < 0.2) & (places < lengths)
        follows = torch.randint(0, 2, (GLOBAL_BATCH,), generator=random)
        tokens = tokens.masked_fill(chosen, VOCABULARY - 1)
        return Batch(
            tokens=tokens,
            targets=text[:, :-1].where(chosen, IGNORED),
            documents=documents.clamp(max=0),
            segments=(places > LENGTH // 2).long(),
            next_sentence=follows,
            **common,
        )
    return Batch(tokens=tokens, targets=text[:, 1:].masked_fill(places >= lengths, IGNORED), documents=documents, **common)


def rows(whole: Batch, numbers: Any) -> Batch:
    held = {n: getattr(whole, n) for n in ("tokens", "targets", "positions", "keys", "documents", "segments", "next_sentence")}
    return replace(whole, **{name: tensor[torch.as_tensor(numbers)] for name, tensor in held.items() if tensor is not None})


@torch.no_grad()
def moved(name: str, precision: Precision, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What has come of each weight since the beginning, where masters are what was left of them in training precision."""
    began = model(name).to(DTYPES.get(precision, torch.float32)).float()
    return {key: (weights[key] - weight).numpy() for key, weight in began.named_parameters()}


def plain(name: str, precision: Precision, optimizer: str, turns: int = TURNS) -> Trace:
    """One process, no DeepSpeed: fp32 masters beside a model in training precision, gradients accumulated in that precision.

    turns: micro batches that a step is dealt into.
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
        for chunk in torch.arange(GLOBAL_BATCH).chunk(turns):
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
    return Trace(losses, norms, moved(name, precision, dict(masters.named_parameters())))


def plain_all(cells: list[tuple[str, Precision]], turns: int = TURNS) -> dict[tuple[str, Precision, str], Trace]:
    return {(name, precision, optimizer): plain(name, precision, optimizer, turns) for name, precision in cells for optimizer in OPTIMIZERS}


def in_pieces(*given: Any) -> dict[str, Any]:
    """What DeepSpeed is told, but that small models are to it as large ones are: their gradients come in many buckets, and ZeRO-3 keeps
    the smallest weights whole, cuts the others, and gathers them anew for each layer.
    """
    told = SETTINGS(*given)
    told["zero_optimization"] |= {
        "reduce_bucket_size": PIECES,
        "allgather_bucket_size": PIECES,
        "sub_group_size": PIECES,
        "stage3_prefetch_bucket_size": PIECES,
        "stage3_max_live_parameters": 2 * PIECES,
        "stage3_param_persistence_threshold": SIZES["width"],
    }
    return told


def gathered(engine: Engine) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Every master, whole; and the names of those that some rank holds other values of than another that holds the same part."""
    prefix = "master/"
    state, names = logical_state(engine), [name for name, _ in engine.module.named_parameters()]
    shapes = [logical_shapes(engine)[prefix + name] for name in names]
    sizes = list(map(math.prod, shapes))
    lowest, highest = torch.full((sum(sizes),), math.inf), torch.full((sum(sizes),), -math.inf)
    for flat in (lowest, highest):
        for name, shape, whole in zip(names, shapes, flat.split(sizes), strict=True):
            if (here := state.get(prefix + name)) is not None:
                for place, held in here.views:
                    whole.view(shape)[place.slices] = held
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    both = list(zip(names, shapes, lowest.split(sizes), highest.split(sizes), strict=True))
    return {name: low.view(shape) for name, shape, low, _ in both}, [name for name, _, low, high in both if not torch.equal(low, high)]


def under(cell: Cell, optimizer: str, fault: Callable[[Engine], None] | None = None, *, compiled: bool = False) -> Trace:
    """The same on this rank's share, in DeepSpeed; with a fault put in, where a control asks for one."""
    torch.nn.functional.linear = LINEAR
    world = World.from_environment()
    data = world.size // (cell.parallel.tensor * cell.parallel.sequence)
    train = TrainConfig(steps=STEPS, global_batch=GLOBAL_BATCH, micro_batch=GLOBAL_BATCH // (TURNS * data))
    layout = layout_for(train, cell.parallel, world.size)
    mesh = world.mesh(layout)
    with patch.object(engines, "deepspeed_config", in_pieces):
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
        taken = [layout.samples(first=0, turn=turn, rank=mesh.data_rank) for turn in range(TURNS)]
        outcome = engine.step([rows(whole, numbers) for numbers in taken], learning_rate=RATES[optimizer])
        assert not outcome.skipped
        terms = outcome.terms.double()
        dist.all_reduce(terms, group=mesh.replicas)
        losses.append(float(terms.sum()))
        norms.append(outcome.grad_norm)
    unknown = layout.zero == 0 and cell.refusal is not None  # to checkpoints, and whole on every rank
    weights, drifted = (dict(engine.module.named_parameters()), []) if unknown else gathered(engine)
    return Trace(losses, norms, moved(cell.model, cell.precision, weights), drifted)


def under_all(cells: list[Cell]) -> list[dict[str, Trace]]:
    """Several cells of as many ranks, one after another in the same processes."""
    return [{optimizer: under(cell, optimizer) for optimizer in OPTIMIZERS} for cell in cells]
