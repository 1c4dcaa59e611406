"""What plain DeepSpeed saved, manta goes on with: the losses that follow are those that DeepSpeed itself would have given."""

import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from parity import LENGTH, MODELS, RATES, VOCABULARY, Cell, batch, model, optimizer_config, rows
from spmd import spmd

from manta.data.errors import InputError
from manta.data.live.live_samples import open_samples
from manta.data.prepare.prepare import find
from manta.launch.cli import main
from manta.launch.config import load
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.backend import open_backend
from manta.trainer.checkpoint.engine_state import progress as progress_of
from manta.trainer.checkpoint.engine_state import restore, settle
from manta.trainer.checkpoint.manifest import LOSS_SCALER, Progress
from manta.trainer.checkpoint.writer import Saver
from manta.trainer.config.model import ExpertsConfig, ModelConfig
from manta.trainer.config.training import OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from manta.trainer.convert.deepspeed.load import load_deepspeed
from manta.trainer.convert.deepspeed.rename import differences, logical_state, progress
from manta.trainer.dataloader.batch import IGNORED, Batch
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.metrics import read_metrics
from manta.trainer.model.build import build
from manta.trainer.model.transformer import Transformer
from manta.trainer.optim.optimizers import build_optimizer
from manta.trainer.run_directory import RunDirectory

SAVED, LAST, GLOBAL_BATCH = 2, 7, 4
BOUNDS = {"fp32": 1e-6, "bf16": 3e-4, "fp16": 3e-5}
LINEAR = torch.nn.functional.linear  # ZeRO-3 puts another in its place, for good
SHAPE: dict[str, Any] = {"layers": 2, "width": 64, "heads": 4, "mlp_width": 128, "norm_epsilon": 1e-5}
EXPERTS = ExpertsConfig(experts=4, top_k=2, width=32, balance="none", router_z_loss=0.0)
BALANCED = ExpertsConfig(experts=4, top_k=2, width=32, router_z_loss=0.0, shared=1, score="sigmoid", balance="bias", bias_update_speed=1e-9)
THEIRS = {  # classes of transformers, and what they are to us
    "GPT2LMHeadModel": ModelConfig(family="gpt2", **SHAPE),
    "LlamaForCausalLM": ModelConfig(kv_heads=2, tied_head=False, **SHAPE),
    "BertForPreTraining": ModelConfig(family="bert", **SHAPE),
    "MixtralForCausalLM": ModelConfig(kv_heads=2, tied_head=False, experts=EXPERTS, **SHAPE),
    "Qwen3MoeForCausalLM": ModelConfig(kv_heads=2, qk_norm=True, experts=EXPERTS, **SHAPE),
    "Glm4MoeForCausalLM": ModelConfig(kv_heads=2, qk_norm=True, experts=BALANCED, **SHAPE),
}
OWN = {"own": ModelConfig(family="parallel:Parallel", kv_heads=2, dropout=0.05, **SHAPE)}
CONFIGS = THEIRS | MODELS | OWN
EXAMPLE = Path(__file__).parents[2] / "examples/own_model"


@dataclass(frozen=True)
class Plain:
    """A way that plain DeepSpeed trains."""

    model: str
    zero: int
    precision: str = "fp32"
    ranks: int = 2
    optimizer: str = "adamw"
    saved: int = SAVED
    zero_settings: dict[str, Any] = field(default_factory=dict, hash=False)
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        more = " ".join(self.zero_settings | self.settings)
        return f"{self.model} zero{self.zero} {self.precision} {self.ranks} ranks {self.optimizer} {self.saved} {more}"


@dataclass(frozen=True)
class Trail:
    losses: list[float]
    scaler: dict[str, float] | None


def text(step: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (GLOBAL_BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def whole_batch(name: str, step: int) -> Batch:
    """As ours read it; what is transformers' has no padding, and its last token predicts nothing."""
    if name not in THEIRS:
        return rows(batch("llama" if name in OWN else name, step), range(GLOBAL_BATCH))
    tokens, keys, places = text(step), torch.arange(GLOBAL_BATCH), torch.arange(LENGTH).expand(GLOBAL_BATCH, LENGTH)
    if name == "BertForPreTraining":  # as many masked in each, so that the mean of means is the mean
        masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(step)).argsort(dim=1) < 5
        told = {"segments": (places > LENGTH // 2).long(), "next_sentence": keys % 2}
        return Batch(tokens=tokens.masked_fill(masked, 3), targets=tokens.where(masked, IGNORED), positions=places, keys=keys, **told)
    targets = torch.cat([tokens[:, 1:], torch.full((GLOBAL_BATCH, 1), IGNORED)], dim=1)
    return Batch(tokens=tokens, targets=targets, positions=places, keys=keys)


def ours(name: str) -> Transformer:
    made = build(CONFIGS[name], vocabulary=VOCABULARY, sequence_length=LENGTH, code=EXAMPLE)
    made.initialize(seed=1)
    return made


def begun(name: str) -> torch.nn.Module:
    if name in OWN:
        return ours(name)
    return transformers_model(name) if name in THEIRS else model(name)


def transformers_model(name: str) -> torch.nn.Module:
    import transformers

    torch.manual_seed(3)
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "hidden_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "tie_word_embeddings": THEIRS[name].tied_head}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    of_decoders = {"rope_parameters": rope, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "intermediate_size": 128}
    of_mixtures = of_decoders | {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "norm_topk_prob": True, "head_dim": 16}
    dropouts = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob")
    more: dict[str, dict[str, Any]] = {
        "GPT2LMHeadModel": {"n_inner": 128},
        "LlamaForCausalLM": of_decoders,
        "BertForPreTraining": {"intermediate_size": 128, "layer_norm_eps": 1e-5},
        "MixtralForCausalLM": of_decoders | {"intermediate_size": 32, "num_local_experts": 4},
        "Qwen3MoeForCausalLM": of_mixtures | {"num_experts": 4},
        "Glm4MoeForCausalLM": of_mixtures | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0, "use_qk_norm": True},
    }
    kind = getattr(transformers, name)
    return kind(kind.config_class(**sizes, **more[name], **dict.fromkeys(dropouts, 0.0)))


def loss_of_theirs(trained: Any, name: str, batch: Batch) -> torch.Tensor:
    if name == "BertForPreTraining":
        labels = batch.targets.where(batch.targets != IGNORED, -100)
        return trained(batch.tokens, token_type_ids=batch.segments, labels=labels, next_sentence_label=batch.next_sentence).loss
    return trained(input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss


def initialized(trained: torch.nn.Module, way: Plain, told: OptimizerConfig, turns: int) -> Any:
    """DeepSpeed as anybody uses it."""
    import deepspeed as ds
    from deepspeed.accelerator import get_accelerator

    torch.nn.functional.linear = LINEAR
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": turns,
        "gradient_clipping": told.gradient_clipping,
        "zero_optimization": {"stage": way.zero, "sub_group_size": 20_000, "stage3_param_persistence_threshold": 100} | way.zero_settings,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": way.precision == "bf16"},
        "fp16": {"enabled": way.precision == "fp16", "loss_scale_window": 1000, "hysteresis": 2},
    }
    settings |= way.settings
    with patch.object(get_accelerator(), "is_fp16_supported", return_value=True):
        engine, *_ = ds.initialize(model=trained, optimizer=build_optimizer(trained.parameters(), told), config=settings)
    return engine


def plain(directory: Path, way: Plain) -> Trail:
    """It trains, saves, and goes on undisturbed."""
    trained = begun(way.model)
    turns = GLOBAL_BATCH // way.ranks
    engine = initialized(trained, way, optimizer_config(way.optimizer).model_copy(update={"learning_rate": RATES[way.optimizer]}), turns)
    if way.precision == "fp16":  # about to be raised, where the run has come so far
        for name, value in zip(LOSS_SCALER, (2.0**15, 995, -1, 1), strict=True):
            setattr(engine.optimizer.loss_scaler, name, value)
    losses = []
    for step in range(LAST):
        if step == way.saved:
            engine.save_checkpoint(str(directory))
        loss = torch.zeros((), dtype=torch.float64)
        for row in range(dist.get_rank(), GLOBAL_BATCH, way.ranks):
            if way.model in THEIRS:
                told = loss_of_theirs(engine, way.model, rows(whole_batch(way.model, step), [row]))
            else:
                whole = whole_batch(way.model, step)
                told = engine(rows(whole, [row]), trained.counts(whole).float().clamp(min=1) / GLOBAL_BATCH).sum()
            engine.backward(told)
            engine.step()
            loss += told.detach().double()
        dist.all_reduce(loss)
        losses.append(float(loss) / GLOBAL_BATCH)
    scaler = {name: getattr(engine.optimizer.loss_scaler, name) for name in LOSS_SCALER} if way.precision == "fp16" else None
    return Trail(losses[way.saved :], scaler)


def config_of(way: Plain, **changes: Any) -> TrainingConfig:
    sections = {
        "run": {"dir": "run"},
        "data": {"sources": ["none"], "sequence_length": LENGTH},
        "model": CONFIGS[way.model].model_dump(mode="json"),
        "optimizer": optimizer_config(way.optimizer).model_dump(mode="json"),
        "train": {"steps": 100, "global_batch": GLOBAL_BATCH, "micro_batch": 1},
        "precision": way.precision,
    }
    sections["data"]["objective"] = "masked" if sections["model"]["family"] == "bert" else "causal"
    return TrainingConfig.model_validate(sections | changes)


def convert(directory: Path, way: Plain, output: Path, **changes: Any) -> Progress:
    config, saved = config_of(way, **changes), load_deepspeed(directory)
    state = logical_state(saved, config, vocabulary=VOCABULARY, code=EXAMPLE, names=None)
    come = progress(saved, config)
    Saver(open_backend(output), identity={}, attempt=0).save(state, come)
    return come


def go_on(directory: Path, way: Plain, cell: Cell) -> Trail:
    """Manta, from a converted checkpoint, under the layout of a cell."""
    torch.nn.functional.linear = LINEAR
    layout = layout_for(TrainConfig(steps=LAST, global_batch=GLOBAL_BATCH, micro_batch=1), cell.parallel, World.from_environment().size)
    mesh = World.from_environment().mesh(layout)
    engine = Engine(ours(way.model), mesh=mesh, optimizer=optimizer_config(way.optimizer), precision=cell.precision)
    where = open_backend(directory)
    checkpoint = catalog.take_newest(where, lambda found: restore(where, found, engine))
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


def check(trails: dict[tuple[Path, Plain], Trail], layouts: list[tuple[int, dict[str, Any]]]) -> None:
    """Each way goes on under the layouts that suit its precision."""
    readers: dict[Any, Trail] = {}
    for (directory, way), wanted in trails.items():
        output = directory / "converted"
        come = convert(directory, way, output)
        assert (come.step, come.samples_consumed) == (way.saved, way.saved * GLOBAL_BATCH)
        assert come.optimizer_steps == (way.saved if way.optimizer == "adamw" else 0)
        for ranks, parallel in layouts:
            cell = Cell(way.model, ranks, way.precision, ParallelConfig(**parallel))
            if way.precision == "fp32" or cell.parallel.zero:
                readers[output, way, cell] = wanted
    for job, trail in by_ranks(all_gone_on, list(readers), lambda job: job[2].ranks).items():
        wanted = readers[job]
        assert difference(trail, wanted) <= BOUNDS[job[1].precision], f"{job[1]} -> {job[2]}"
        assert trail.scaler == wanted.scaler, f"{job[1]} -> {job[2]}"
        assert wanted.scaler is None or wanted.scaler["cur_scale"] == 2.0**16  # it was raised on the way


def trained(directory: Path, ways: list[Plain]) -> dict[tuple[Path, Plain], Trail]:
    return by_ranks(all_plain, [(directory / str(way), way) for way in ways], lambda job: job[1].ranks)


SIMPLE = Plain("llama", 1)
FEW = [
    SIMPLE,
    Plain("llama", 0),
    Plain("LlamaForCausalLM", 2),
    Plain("GPT2LMHeadModel", 3),
]
MORE = [
    Plain("llama", 1, "bf16", optimizer="sgd"),
    Plain("llama", 2, zero_settings={"round_robin_gradients": True}),
    Plain("llama", 3, "fp16"),
]


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> dict[tuple[Path, Plain], Trail]:
    return trained(tmp_path_factory.mktemp("deepspeed"), FEW)


@pytest.fixture
def simple(few, tmp_path) -> Path:
    """A copy, to be damaged."""
    directory = next(directory for directory, way in few if way == SIMPLE)
    return Path(shutil.copytree(directory, tmp_path / "simple"))


ELSEWHERE = [(2, {"tensor": 2, "zero": 1})]


def test_a_run_of_deepspeed_goes_on_under_another_layout(few):
    check(few, ELSEWHERE)


@pytest.mark.slow
def test_a_run_in_sixteen_bits_or_with_gradients_dealt_in_turn_does_too(tmp_path):
    check(trained(tmp_path, MORE), ELSEWHERE)


LAYOUTS = [(1, {"zero": 0}), (1, {"zero": 3}), (2, {"zero": 1}), (2, {"zero": 3}), (2, {"tensor": 2, "zero": 1})]
STAGES = [(0, "fp32"), *((zero, precision) for zero in (1, 2, 3) for precision in ("fp32", "bf16", "fp16"))]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["llama", "GPT2LMHeadModel", "LlamaForCausalLM"])
def test_every_stage_precision_and_optimizer_goes_on_under_every_layout(tmp_path, name):
    among = [(zero, precision, ranks, optimizer) for zero, precision in STAGES for ranks in (1, 2) for optimizer in ("adamw", "sgd")]
    check(trained(tmp_path, [Plain(name, *way) for way in among]), LAYOUTS)


FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}  # DeepSpeed then has another optimizer of its own around ours


@pytest.mark.slow
def test_every_architecture_of_transformers_goes_on(tmp_path):
    check(trained(tmp_path, [Plain(name, zero) for name in THEIRS for zero in (0, 1, 3)]), [(2, {"zero": 1})])


@pytest.mark.slow
def test_what_deepspeed_keeps_otherwise_goes_on_too(tmp_path):
    ways = [
        Plain("llama", 1, "bf16", settings=FP32_SUMS),
        Plain("own", 1),
        Plain("own", 3),
        Plain("gpt2", 2),  # with dropout
        Plain("llama", 1, zero_settings={"elastic_checkpoint": True}),
        Plain("llama", 2, zero_settings={"offload_optimizer": {"device": "cpu"}}),
        Plain("llama", 3, zero_settings={"offload_optimizer": {"device": "cpu"}}),
    ]
    check(trained(tmp_path, ways), [(2, {"zero": 1})])


@pytest.mark.slow
def test_a_run_that_was_saved_before_its_first_step_begins_so(tmp_path):
    ways = [Plain("llama", zero, optimizer=optimizer, saved=0) for zero in (0, 1, 2, 3) for optimizer in ("adamw", "sgd")]
    check(trained(tmp_path, ways), [(2, {"zero": 1})])


def share_of(directory: Path, rank: int) -> Path:
    (file,) = directory.glob(f"*/*_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return file


def test_the_comparison_notices_what_is_lost_or_exchanged(few, simple):
    shares = [torch.load(share_of(simple, rank), weights_only=False) for rank in (0, 1)]  # of our own making
    first, second = (share["optimizer_state_dict"] for share in shares)

    def written(name: str) -> tuple[Path, Plain, Cell]:
        damaged = Path(shutil.copytree(simple, simple.with_name(name)))
        for rank, share in enumerate(shares):
            torch.save(share, share_of(damaged, rank))
        convert(damaged, SIMPLE, damaged / "converted")
        return damaged / "converted", SIMPLE, Cell(SIMPLE.model, 2)

    jobs = [written("as it is")]
    both = [share.pop("single_partition_of_fp32_groups") for share in (first, second)]
    for share, partition in zip((first, second), reversed(both), strict=True):
        share["single_partition_of_fp32_groups"] = partition
    jobs.append(written("exchanged"))
    for share, partition in zip((first, second), both, strict=True):
        share["single_partition_of_fp32_groups"] = partition
        for state in share["base_optimizer_state"]["state"].values():
            state["exp_avg"].zero_()
    jobs.append(written("forgotten"))
    wanted = next(trail for (_, way), trail in few.items() if way == SIMPLE)
    kept, exchanged, forgotten = (difference(trail, wanted) for trail in spmd(all_gone_on, 2, jobs)[0])
    assert kept <= 1e-6
    assert exchanged > 1e-3
    assert forgotten > 1e-4


class Hostile:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.file}'",)


def refused(directory: Path, way: Plain = SIMPLE, **changes: Any) -> str:
    with pytest.raises(InputError) as raised:
        convert(directory, way, directory / "never", **changes)
    assert not (directory / "never").exists()
    told = str(raised.value)
    assert "\n" not in told
    return told


def test_a_file_that_is_missing_cut_short_or_of_another_rank_is_named(simple):
    whole = share_of(simple, 1).read_bytes()
    share_of(simple, 1).write_bytes(whole[: len(whole) // 2])
    assert f"{share_of(simple, 1)}: got a file that can not be read (" in refused(simple)
    share_of(simple, 1).write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    assert f"{share_of(simple, 1)}: got bytes of " in refused(simple)
    share_of(simple, 1).write_bytes(share_of(simple, 0).read_bytes())
    assert "got the partition of another rank as that of rank 1" in refused(simple)
    missing = share_of(simple, 1)
    missing.unlink()
    assert refused(simple).startswith(f"{missing}: got no such file, wants those of all 2 ranks")
    missing.write_bytes(whole)
    surplus = missing.with_name(missing.name.replace("_rank_1_", "_rank_2_", 1))
    surplus.write_bytes(whole)
    assert refused(simple).startswith(f"{surplus}: got a rank's file of another save")
    surplus.rename(surplus.with_name("mp_rank_01_model_states.pt"))
    assert "got a model cut over tensor, pipeline or expert ranks" in refused(simple)
    surplus.with_name("mp_rank_01_model_states.pt").unlink()
    (simple / "latest").write_text("global_step9")
    assert refused(simple).startswith(f"{simple / 'latest'}: got global_step9, and there is no such folder")
    (simple / "latest").unlink()
    assert refused(simple).startswith(f"{simple}: got no latest, wants")
    assert convert(simple / f"global_step{SAVED}", SIMPLE, simple / "of the folder").step == SAVED


@pytest.mark.parametrize("name", ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"])
def test_a_hostile_pickle_is_refused_and_does_nothing(simple, name):
    file, made = simple / f"global_step{SAVED}" / name, simple / "made"
    held = torch.load(file, weights_only=False)
    torch.save(held | {"client": Hostile(made)}, file)
    told = refused(simple)
    assert told.startswith(f"{file}: got posix.system, wants tensors")
    assert not made.exists()
    torch.load(file, weights_only=False)
    assert made.exists(), "it was no danger"


def test_another_model_or_optimizer_is_refused_with_the_first_difference(few, simple):
    told = refused(simple, Plain("gpt2", 1))
    assert "position_embedding.weight: got nothing, wants [32, 64] (and" in told
    sgd = optimizer_config("sgd").model_dump(mode="json")
    assert "got the optimizer's exp_avg, which sgd does not keep" in refused(simple, optimizer=sgd)
    of = {way.model: (directory, way) for directory, way in few}
    assert "model.layers.1.input_layernorm.weight: got [64], wants nothing (and" in refused(
        *of["LlamaForCausalLM"], model=THEIRS["LlamaForCausalLM"].model_copy(update={"layers": 1}).model_dump(mode="json")
    )
    untied = THEIRS["GPT2LMHeadModel"].model_copy(update={"tied_head": False}).model_dump(mode="json")
    assert "lm_head.weight: got it tied to transformer.wte.weight, wants it apart" in refused(*of["GPT2LMHeadModel"], model=untied)


def test_without_zero_weights_are_never_guessed(few, tmp_path):
    directory = next(directory for directory, way in few if way == Plain("llama", 0))
    at = Path(shutil.copytree(directory / f"global_step{SAVED}", tmp_path / "whole"))
    wanted = {name: states["exp_avg"].clone() for name, states in load_deepspeed(at).parameters.items()}
    held = torch.load(at / "mp_rank_00_model_states.pt", weights_only=False)
    matrices, others = held["optimizer"]["param_groups"]
    numbers, names = matrices["params"], [name for name, weight in held["module"].items() if weight.ndim > 1]
    odd, even = ({**matrices, "params": numbers[first::2]} for first in (0, 1))
    held["optimizer"]["param_groups"] = [odd, even, others]
    torch.save(held, at / "mp_rank_00_model_states.pt")
    assert "got several groups of the optimizer that it may be in, wants one; save under ZeRO 1, 2 or 3" in refused(at)
    for group, of_group in ((odd, names[::2]), (even, names[1::2]), (others, [name for name in wanted if name not in names])):
        group["param_names"] = of_group
    torch.save(held, at / "mp_rank_00_model_states.pt")
    found = load_deepspeed(at).parameters
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name]["exp_avg"], wanted[name]) for name in wanted)
    held["module"]["norm.weight"] = torch.ones(65)
    for group in (odd, even, others):
        del group["param_names"]
    torch.save(held, at / "mp_rank_00_model_states.pt")
    assert "norm.weight: got [65], and the optimizer has no weight of that shape next" in refused(at)


def test_what_deepspeed_was_told_otherwise_is_said(simple):
    saved = load_deepspeed(simple)
    assert differences(saved, config_of(SIMPLE)) == []
    told = optimizer_config("adamw").model_copy(update={"beta2": 0.9, "epsilon": 1e-8, "weight_decay": 0.0, "gradient_clipping": 1.0})
    train = {"steps": 100, "global_batch": 8, "micro_batch": 1}
    assert differences(saved, config_of(SIMPLE, optimizer=told.model_dump(mode="json"), train=train)) == [
        "optimizer.beta2: DeepSpeed had 0.95, this config has 0.9",
        "optimizer.epsilon: DeepSpeed had 1e-05, this config has 1e-08",
        "optimizer.weight_decay of embedding.weight: DeepSpeed had 0.1, this config has 0.0",
        "optimizer.gradient_clipping: DeepSpeed had 0.25, this config has 1.0",
        "samples read: DeepSpeed had 8, this config has 16",
    ]


def plain_run(directory: Path, config: TrainingConfig, tokens: int, batches: list[Batch], saved: int) -> list[float]:
    """The run of a config, in DeepSpeed and nothing of ours but the model and what it reads."""
    trained = build(config.model, vocabulary=tokens, sequence_length=config.data.sequence_length)
    trained.initialize(config.run.seed)
    engine = initialized(trained, Plain("llama", 2), config.optimizer, len(batches[0].tokens) // dist.get_world_size())
    losses = []
    for step, whole in enumerate(batches):
        if step == saved:
            engine.save_checkpoint(str(directory), client_state={"note": "a user's own"})
        loss = torch.zeros((), dtype=torch.float64)
        for row in range(dist.get_rank(), len(whole.tokens), dist.get_world_size()):
            told = engine(rows(whole, [row]), trained.counts(whole).float().clamp(min=1) / len(whole.tokens)).sum()
            engine.backward(told)
            engine.step()
            loss += told.detach().double()
        dist.all_reduce(loss)
        losses.append(float(loss) / len(whole.tokens))
    return losses


def typed(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """The command in this process: its exit code, and what it says of a mistake."""
    monkeypatch.setattr(sys, "argv", ["manta", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err


@pytest.mark.slow
def test_what_was_converted_by_the_command_is_a_run_that_goes_on(workspace, tmp_path, monkeypatch, capsys):
    given = ["run.dir=from deepspeed", "train.steps=8", "schedule.shape=constant", "evaluate.every_steps=100", "optimizer.epsilon=1e-5"]
    config = load(workspace.config_file, given)
    with monkeypatch.context() as there:  # and not where ranks are forked: the user's own files lie there
        there.chdir(workspace.directory)
        samples = open_samples(find(config.data, config.tokenizer), config.data, config.tokenizer, seed=config.run.seed)
    numbers = (np.arange(step * 8, step * 8 + 8) for step in range(8))
    batches = [Batch.from_examples(samples.train(taken, sequence_length=32), seed=config.run.seed) for taken in numbers]
    wanted = spmd(plain_run, 2, tmp_path / "theirs", config, samples.tokenizer_vocabulary, batches, 5)[0]
    command = ("checkpoint", "convert", str(tmp_path / "theirs"), str(workspace.config_file), *given)
    done = workspace.manta(*command)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    path, told = done.stdout.splitlines()
    assert path == str(workspace.directory / "from deepspeed/checkpoints/step-00000005")
    assert told == f"go on with it: {shlex.join(['manta', 'train', str(workspace.config_file), *given])}"
    assert RunDirectory(workspace.directory / "from deepspeed").manifest()["manta"]
    with monkeypatch.context() as there:
        there.chdir(workspace.directory)
        code, said = typed(there, capsys, *command)
    assert code == 2
    assert "holds a run that has trained already" in said
    done = workspace.manta(*shlex.split(told.removeprefix("go on with it: manta ")))
    assert done.returncode == 0, done.stderr
    lines = read_metrics(workspace.directory / "from deepspeed/metrics.jsonl")
    assert [line["step"] for line in lines] == [6, 7, 8]
    assert [line["train/loss"] for line in lines] == pytest.approx(wanted[5:], rel=1e-6)


def test_what_can_not_go_on_is_told_in_a_line_and_nothing_is_written(workspace, simple, monkeypatch, capsys):
    monkeypatch.chdir(workspace.directory)
    file, theirs = str(workspace.config_file), str(simple)
    for arguments, told in (
        ([str(simple.parent), file], "got no latest, wants what engine.save_checkpoint wrote"),
        ([theirs, file], "embedding.weight: got [256, 64], wants [512, 64] (and"),
        ([theirs, file, "--names", "huggingface"], "model.embed_tokens.weight: got nothing, wants [512, 64]"),
        ([theirs, file, "--names", "mine"], "--names: got 'mine', wants manta or huggingface"),
        ([theirs, file, "train.steps=1"], f"train.steps: got 1, and {simple}/global_step2 is of step 2"),
        ([theirs, file, "run.start_from=imported/gpt2"], "run.start_from: got"),
        ([theirs, str(simple / "none.yaml")], "none.yaml: No such file"),
    ):
        code, said = typed(monkeypatch, capsys, "checkpoint", "convert", *arguments, "run.dir=never converted")
        assert (code, len(said.splitlines())) == (2, 1), said
        assert told in said
        assert not (workspace.directory / "never converted").exists()
