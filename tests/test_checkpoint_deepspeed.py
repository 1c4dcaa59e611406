"""What plain DeepSpeed saved, manta goes on with: the losses that follow are those that DeepSpeed itself would have given."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import yaml
from parity import LENGTH, MODELS, RATES, VOCABULARY, Cell, batch, model, optimizer_config, rows
from spmd import spmd

from manta.data.errors import InputError
from manta.trainer.batch import IGNORED, Batch
from manta.trainer.checkpoint import store
from manta.trainer.checkpoint.manifest import Progress
from manta.trainer.checkpoint.saver import Saver
from manta.trainer.checkpoint.state import LOSS_SCALER, restore, settle
from manta.trainer.checkpoint.state import progress as progress_of
from manta.trainer.checkpoint.storage import Folder
from manta.trainer.config import ParallelConfig, TrainConfig, TrainingConfig
from manta.trainer.convert import deepspeed
from manta.trainer.convert.deepspeed_names import logical_state, progress
from manta.trainer.engine import Engine
from manta.trainer.layout import fits
from manta.trainer.metrics import read_metrics
from manta.trainer.model.build import build
from manta.trainer.model_config import ModelConfig
from manta.trainer.optim import build_optimizer
from manta.trainer.world import World

SAVED, LAST, GLOBAL_BATCH = 2, 7, 4
BOUNDS = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-3}
LINEAR = torch.nn.functional.linear  # ZeRO-3 puts another in its place, for good
SHAPE: dict[str, Any] = {"layers": 2, "width": 64, "heads": 4, "mlp_width": 128, "norm_epsilon": 1e-5}
THEIRS = {  # classes of transformers, and what they are to us
    "GPT2LMHeadModel": ModelConfig(family="gpt2", **SHAPE),
    "LlamaForCausalLM": ModelConfig(kv_heads=2, tied_head=False, **SHAPE),
}


@dataclass(frozen=True)
class Plain:
    """A way that plain DeepSpeed trains."""

    model: str
    zero: int
    precision: str = "fp32"
    ranks: int = 2
    optimizer: str = "adamw"
    zero_settings: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.model} zero{self.zero} {self.precision} {self.ranks} ranks {self.optimizer}"


@dataclass(frozen=True)
class Trail:
    losses: list[float]
    scaler: dict[str, float] | None


def text(step: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (GLOBAL_BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def whole_batch(name: str, step: int) -> Batch:
    """As ours read it; what is transformers' has no padding, and its last token predicts nothing."""
    if name not in THEIRS:
        return rows(batch(name, step), range(GLOBAL_BATCH))
    tokens = text(step)
    targets = torch.cat([tokens[:, 1:], torch.full((GLOBAL_BATCH, 1), IGNORED)], dim=1)
    return Batch(tokens=tokens, targets=targets, positions=torch.arange(LENGTH).expand_as(tokens), keys=torch.arange(GLOBAL_BATCH))


def transformers_model(name: str) -> torch.nn.Module:
    import transformers

    torch.manual_seed(3)
    if name == "GPT2LMHeadModel":
        sizes = {"n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128}
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, **dropouts))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, rms_norm_eps=1e-5, tie_word_embeddings=False, **sizes)
    return transformers.LlamaForCausalLM(config)


def plain(directory: Path, way: Plain, before: int = SAVED) -> Trail:
    """DeepSpeed as anybody uses it: it trains, saves, and goes on undisturbed."""
    import deepspeed as ds
    from deepspeed.accelerator import get_accelerator

    torch.nn.functional.linear = LINEAR
    trained = transformers_model(way.model) if way.model in THEIRS else model(way.model)
    turns = GLOBAL_BATCH // way.ranks
    zero = {"stage": way.zero, "sub_group_size": 20_000, "stage3_param_persistence_threshold": 100} | way.zero_settings
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": turns,
        "gradient_clipping": 0.25,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": way.precision == "bf16"},
        "fp16": {"enabled": way.precision == "fp16", "loss_scale_window": 1000, "hysteresis": 2},
    }
    optimizer = build_optimizer(trained.parameters(), optimizer_config(way.optimizer))
    with patch.object(get_accelerator(), "is_fp16_supported", return_value=True):
        engine, *_ = ds.initialize(model=trained, optimizer=optimizer, config=settings)
    if way.precision == "fp16":  # about to be raised, where the run has come so far
        for name, value in zip(LOSS_SCALER, (2.0**15, 995, -1, 1), strict=True):
            setattr(engine.optimizer.loss_scaler, name, value)
    for group in engine.optimizer.param_groups:
        group["lr"] = RATES[way.optimizer]
    losses = []
    for step in range(LAST):
        if step == before:
            engine.save_checkpoint(str(directory))
        loss = 0.0
        for turn in range(turns):
            row = turn * way.ranks + dist.get_rank()
            if way.model in THEIRS:
                tokens = text(step)[row : row + 1]
                told = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
            else:
                counts = trained.counts(whole_batch(way.model, step)).float().clamp(min=1)
                told = engine(rows(whole_batch(way.model, step), [row]), counts / GLOBAL_BATCH).sum()
            engine.backward(told)
            engine.step()
            loss += told.detach().double()
        dist.all_reduce(loss)
        losses.append(float(loss) / GLOBAL_BATCH)
    scaler = {name: getattr(engine.optimizer.loss_scaler, name) for name in LOSS_SCALER} if way.precision == "fp16" else None
    return Trail(losses[before:], scaler)


def config_of(way: Plain, **changes: Any) -> TrainingConfig:
    sections = {
        "run": {"dir": "run"},
        "data": {"sources": ["none"], "sequence_length": LENGTH},
        "model": (THEIRS | MODELS)[way.model].model_dump(mode="json"),
        "optimizer": optimizer_config(way.optimizer).model_dump(mode="json"),
        "train": {"steps": 100, "global_batch": GLOBAL_BATCH, "micro_batch": 1},
        "precision": way.precision,
    }
    sections["data"]["objective"] = "masked" if sections["model"]["family"] == "bert" else "causal"
    return TrainingConfig.model_validate(sections | changes)


def convert(directory: Path, way: Plain, output: Path, **changes: Any) -> Progress:
    config, saved = config_of(way, **changes), deepspeed.load(directory)
    state = logical_state(saved, config, vocabulary=VOCABULARY, code=Path.cwd(), names=None)
    come = progress(saved, config)
    Saver(Folder(output), identity={}, attempt=0).save(state, come)
    return come


def go_on(directory: Path, way: Plain, cell: Cell) -> Trail:
    """Manta, from a converted checkpoint, under the layout of a cell."""
    torch.nn.functional.linear = LINEAR
    layout = fits(TrainConfig(steps=LAST, global_batch=GLOBAL_BATCH, micro_batch=1), World.from_environment().size, cell.parallel)
    made = build((THEIRS | MODELS)[way.model], vocabulary=VOCABULARY, sequence_length=LENGTH)
    made.initialize(seed=1)
    mesh = World.from_environment().mesh(layout)
    engine = Engine(made, mesh=mesh, optimizer=optimizer_config(way.optimizer), precision=cell.precision)
    where = Folder(directory)
    checkpoint = store.take_newest(where, lambda found: restore(where, found, engine))
    settle(checkpoint.progress, engine)
    losses = []
    for step in range(checkpoint.progress.step, LAST):
        whole = whole_batch(way.model, step)
        numbers = (layout.samples(first=0, turn=turn, rank=mesh.data_rank) for turn in range(layout.accumulation(GLOBAL_BATCH)))
        terms = engine.step([rows(whole, taken) for taken in numbers], learning_rate=RATES[way.optimizer]).terms.double()
        dist.all_reduce(terms, group=mesh.replicas)
        losses.append(float(terms.sum()))
    return Trail(losses, progress_of(engine, step=0, samples_consumed=0).loss_scaler)


def all_plain(jobs: list[tuple[Path, Plain]]) -> list[Trail]:
    return [plain(directory, way) for directory, way in jobs]


def all_gone_on(jobs: list[tuple[Path, Plain, Cell]]) -> list[Trail]:
    return [go_on(*job) for job in jobs]


def by_ranks(function: Any, jobs: list[Any], ranks_of: Any) -> dict[Any, Trail]:
    seen = {}
    for ranks in sorted({ranks_of(job) for job in jobs}):
        here = [job for job in jobs if ranks_of(job) == ranks]
        seen |= dict(zip(here, spmd(function, ranks, here, timeout=1800.0)[0], strict=True))
    return seen


def difference(ours: Trail, theirs: Trail) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True))


def check(tmp_path: Path, ways: list[Plain], layouts: list[tuple[int, dict[str, Any]]]) -> None:
    """Each way goes on under the layouts that suit its precision."""
    jobs = [(tmp_path / str(way), way) for way in ways]
    undisturbed = by_ranks(all_plain, jobs, lambda job: job[1].ranks)
    readers: dict[Any, Any] = {}
    for directory, way in jobs:
        output = directory / "converted"
        come = convert(directory, way, output)
        assert (come.step, come.samples_consumed) == (SAVED, SAVED * GLOBAL_BATCH)
        assert come.optimizer_steps == (SAVED if way.optimizer == "adamw" else 0)
        for ranks, parallel in layouts:
            cell = Cell(way.model, ranks, way.precision, ParallelConfig(**parallel))
            if way.precision == "fp32" or cell.parallel.zero:
                readers[output, way, cell] = (directory, way)
    for job, trail in by_ranks(all_gone_on, list(readers), lambda job: job[2].ranks).items():
        wanted = undisturbed[readers[job]]
        assert difference(trail, wanted) <= BOUNDS[job[1].precision], f"{job[1]} -> {job[2]}"
        assert trail.scaler == wanted.scaler, f"{job[1]} -> {job[2]}"
        assert wanted.scaler is None or wanted.scaler["cur_scale"] == 2.0**16  # it was raised on the way


def test_a_run_of_deepspeed_goes_on_under_another_layout(tmp_path):
    ways = [
        Plain("llama", 0),
        Plain("llama", 1, "bf16", optimizer="sgd"),
        Plain("llama", 2, zero_settings={"round_robin_gradients": True}),
        Plain("llama", 3, "fp16"),
    ]
    check(tmp_path, ways, [(2, {"tensor": 2, "zero": 1})])


LAYOUTS = [(1, {"zero": 0}), (1, {"zero": 3}), (2, {"zero": 1}), (2, {"zero": 3}), (2, {"tensor": 2, "zero": 1})]
EVERY = [
    Plain(name, zero, precision, ranks, optimizer)
    for name in ("llama", *THEIRS)
    for zero, precision in [(0, "fp32"), *((zero, precision) for zero in (1, 2, 3) for precision in ("fp32", "bf16", "fp16"))]
    for ranks in (1, 2)
    for optimizer in ("adamw", "sgd")
]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["llama", *THEIRS])
def test_every_stage_precision_and_optimizer_goes_on_under_every_layout(tmp_path, name):
    check(tmp_path, [way for way in EVERY if way.model == name], LAYOUTS)


def test_a_model_of_transformers_goes_on_as_ours(tmp_path):
    check(tmp_path, [Plain("GPT2LMHeadModel", 3, "bf16"), Plain("LlamaForCausalLM", 2)], [(2, {"zero": 3})])
