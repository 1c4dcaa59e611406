"""Conversion of DeepSpeed checkpoints: the losses of the resumed run are those of the undisturbed DeepSpeed run."""

import copy
import math
import os
import shlex
import shutil
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fuzz import assert_refused_or_done, call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import LENGTH, MODELS, RATES, VOCABULARY, Cell, batch, optimizer_config, rows
from parity import model as reference_model
from spmd import spmd
from tree_edits import EDIT, Edit, edit

from manta.data.errors import InputError
from manta.data.live.live_samples import open_samples
from manta.data.prepare.prepare import find_prepared
from manta.launch.cli import main
from manta.launch.config import load
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.engine_state import engine_progress as progress_of
from manta.trainer.checkpoint.engine_state import finish_restore, restore
from manta.trainer.checkpoint.manifest import LOSS_SCALER_FIELDS, Progress
from manta.trainer.checkpoint.storage import open_backend
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.config.model import ExpertsConfig, ModelConfig
from manta.trainer.config.sections import OptimizerConfig, ParallelConfig, TrainConfig
from manta.trainer.config.training import TrainingConfig
from manta.trainer.convert.deepspeed.load import load_deepspeed
from manta.trainer.convert.deepspeed.rename import differences, logical_state, progress
from manta.trainer.dataloader.batch import IGNORED, Batch
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.metrics import read_metrics
from manta.trainer.model.build import build_model
from manta.trainer.model.transformer import Transformer
from manta.trainer.optim.optimizers import build_optimizer
from manta.trainer.run_directory import RunDirectory

SAVED, LAST, GLOBAL_BATCH = 2, 7, 4
BOUNDS = {"fp32": 1e-6, "bf16": 3e-4, "fp16": 3e-5}
LINEAR = torch.nn.functional.linear  # ZeRO-3 replaces it for the whole process
SHAPE: dict[str, Any] = {"layers": 2, "width": 64, "heads": 4, "mlp_width": 128, "norm_epsilon": 1e-5}
EXPERTS = ExpertsConfig(experts=4, top_k=2, width=32, balance="none", router_z_loss=0.0)
BALANCED = ExpertsConfig(experts=4, top_k=2, width=32, router_z_loss=0.0, shared=1, score="sigmoid", balance="bias", bias_update_speed=1e-9)
TRANSFORMERS = {  # classes of transformers, and our config of the same model
    "GPT2LMHeadModel": ModelConfig(family="gpt2", **SHAPE),
    "LlamaForCausalLM": ModelConfig(kv_heads=2, tied_head=False, **SHAPE),
    "BertForPreTraining": ModelConfig(family="bert", **SHAPE),
    "MixtralForCausalLM": ModelConfig(kv_heads=2, tied_head=False, experts=EXPERTS, **SHAPE),
    "Qwen3MoeForCausalLM": ModelConfig(kv_heads=2, qk_norm=True, experts=EXPERTS, **SHAPE),
    "Glm4MoeForCausalLM": ModelConfig(kv_heads=2, qk_norm=True, experts=BALANCED, **SHAPE),
}
OWN = {"own": ModelConfig(family="parallel:Parallel", kv_heads=2, dropout=0.05, **SHAPE)}
CONFIGS = TRANSFORMERS | MODELS | OWN
EXAMPLE = Path(__file__).parents[2] / "examples/own_model"


@dataclass(frozen=True)
class Setup:
    """How plain DeepSpeed trains."""

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
class Trajectory:
    losses: list[float]
    scaler: dict[str, float] | None


def text(step: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (GLOBAL_BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def global_batch(name: str, step: int) -> Batch:
    """The batch that our models read. Those of transformers have no padding, and their last token predicts nothing."""
    if name not in TRANSFORMERS:
        return rows(batch("llama" if name in OWN else name, step), range(GLOBAL_BATCH))
    tokens, keys, places = text(step), torch.arange(GLOBAL_BATCH), torch.arange(LENGTH).expand(GLOBAL_BATCH, LENGTH)
    if name == "BertForPreTraining":  # the same number of masked tokens in each row, so that the mean of means is the mean
        masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(step)).argsort(dim=1) < 5
        parts = {"segments": (places > LENGTH // 2).long(), "next_sentence": keys % 2}
        return Batch(tokens=tokens.masked_fill(masked, 3), targets=tokens.where(masked, IGNORED), positions=places, keys=keys, **parts)
    targets = torch.cat([tokens[:, 1:], torch.full((GLOBAL_BATCH, 1), IGNORED)], dim=1)
    return Batch(tokens=tokens, targets=targets, positions=places, keys=keys)


def manta_model(name: str) -> Transformer:
    model = build_model(CONFIGS[name], vocabulary=VOCABULARY, sequence_length=LENGTH, code=EXAMPLE)
    model.initialize(seed=1)
    return model


def new_model(name: str) -> torch.nn.Module:
    if name in OWN:
        return manta_model(name)
    return transformers_model(name) if name in TRANSFORMERS else reference_model(name)


def transformers_model(name: str) -> torch.nn.Module:
    import transformers

    torch.manual_seed(3)
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "hidden_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "tie_word_embeddings": TRANSFORMERS[name].tied_head}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    decoder = {"rope_parameters": rope, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "intermediate_size": 128}
    mixture = decoder | {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "norm_topk_prob": True, "head_dim": 16}
    dropouts = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob")
    more: dict[str, dict[str, Any]] = {
        "GPT2LMHeadModel": {"n_inner": 128},
        "LlamaForCausalLM": decoder,
        "BertForPreTraining": {"intermediate_size": 128, "layer_norm_eps": 1e-5},
        "MixtralForCausalLM": decoder | {"intermediate_size": 32, "num_local_experts": 4},
        "Qwen3MoeForCausalLM": mixture | {"num_experts": 4},
        "Glm4MoeForCausalLM": mixture | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0, "use_qk_norm": True},
    }
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**sizes, **more[name], **dict.fromkeys(dropouts, 0.0)))


def transformers_loss(trained: Any, name: str, batch: Batch) -> torch.Tensor:
    if name == "BertForPreTraining":
        labels = batch.targets.where(batch.targets != IGNORED, -100)
        return trained(batch.tokens, token_type_ids=batch.segments, labels=labels, next_sentence_label=batch.next_sentence).loss
    return trained(input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss


def deepspeed_engine(trained: torch.nn.Module, setup: Setup, config: OptimizerConfig, accumulation: int) -> Any:
    """DeepSpeed as its users call it."""
    import deepspeed as ds
    from deepspeed.accelerator import get_accelerator

    torch.nn.functional.linear = LINEAR
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.gradient_clipping,
        "zero_optimization": {"stage": setup.zero, "sub_group_size": 20_000, "stage3_param_persistence_threshold": 100}
        | setup.zero_settings,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": setup.precision == "bf16"},
        "fp16": {"enabled": setup.precision == "fp16", "loss_scale_window": 1000, "hysteresis": 2},
    }
    settings |= setup.settings
    with patch.object(get_accelerator(), "is_fp16_supported", return_value=True):
        engine, *_ = ds.initialize(model=trained, optimizer=build_optimizer(trained.parameters(), config), config=settings)
    return engine


def train_with_deepspeed(directory: Path, setup: Setup) -> Trajectory:
    """Train, save on the way, and continue undisturbed."""
    trained = new_model(setup.model)
    config = optimizer_config(setup.optimizer).model_copy(update={"learning_rate": RATES[setup.optimizer]})
    engine = deepspeed_engine(trained, setup, config, GLOBAL_BATCH // setup.ranks)
    if setup.precision == "fp16":  # the scale is about to be raised
        for name, value in zip(LOSS_SCALER_FIELDS, (2.0**15, 995, -1, 1), strict=True):
            setattr(engine.optimizer.loss_scaler, name, value)
    losses = []
    for step in range(LAST):
        if step == setup.saved:
            engine.save_checkpoint(str(directory))
        loss = torch.zeros((), dtype=torch.float64)
        for row in range(dist.get_rank(), GLOBAL_BATCH, setup.ranks):
            if setup.model in TRANSFORMERS:
                row_loss = transformers_loss(engine, setup.model, rows(global_batch(setup.model, step), [row]))
            else:
                whole = global_batch(setup.model, step)
                row_loss = engine(rows(whole, [row]), trained.counts(whole).float().clamp(min=1) / GLOBAL_BATCH).sum()
            engine.backward(row_loss)
            engine.step()
            loss += row_loss.detach().double()
        dist.all_reduce(loss)
        losses.append(float(loss) / GLOBAL_BATCH)
    scaler = {name: getattr(engine.optimizer.loss_scaler, name) for name in LOSS_SCALER_FIELDS} if setup.precision == "fp16" else None
    return Trajectory(losses[setup.saved :], scaler)


def training_config(setup: Setup, **changes: Any) -> TrainingConfig:
    sections = {
        "run": {"dir": "run"},
        "data": {"sources": ["none"], "sequence_length": LENGTH},
        "model": CONFIGS[setup.model].model_dump(mode="json"),
        "optimizer": optimizer_config(setup.optimizer).model_dump(mode="json"),
        "train": {"steps": 100, "global_batch": GLOBAL_BATCH, "micro_batch": 1},
        "precision": setup.precision,
    }
    sections["data"]["objective"] = "masked" if sections["model"]["family"] == "bert" else "causal"
    return TrainingConfig.model_validate(sections | changes)


def convert(directory: Path, setup: Setup, output: Path, **changes: Any) -> Progress:
    config, source = training_config(setup, **changes), load_deepspeed(directory)
    state = logical_state(source, config, vocabulary=VOCABULARY, code=EXAMPLE, names=None)
    position = progress(source, config)
    CheckpointWriter(open_backend(output), identity={}, attempt=0).save(state, position)
    return position


def resume_with_manta(directory: Path, setup: Setup, cell: Cell) -> Trajectory:
    """Resume a converted checkpoint under the layout of a cell."""
    torch.nn.functional.linear = LINEAR
    layout = layout_for(TrainConfig(steps=LAST, global_batch=GLOBAL_BATCH, micro_batch=1), cell.parallel, World.from_environment().size)
    mesh = World.from_environment().mesh(layout)
    engine = Engine(manta_model(setup.model), mesh=mesh, optimizer=optimizer_config(setup.optimizer), precision=cell.precision)
    backend = open_backend(directory)
    checkpoint = catalog.restore_newest(backend, lambda found: restore(backend, found, engine))
    finish_restore(checkpoint.progress, engine)
    losses = []
    for step in range(checkpoint.progress.step, LAST):
        whole = global_batch(setup.model, step)
        numbers = (
            layout.samples_of_rank(first=0, micro_step=micro_step, rank=mesh.data_rank)
            for micro_step in range(layout.accumulation(GLOBAL_BATCH))
        )
        terms = engine.step([rows(whole, taken) for taken in numbers], learning_rate=RATES[setup.optimizer]).terms.double()
        dist.all_reduce(terms, group=mesh.replicas)
        losses.append(float(terms.sum()))
    return Trajectory(losses, progress_of(engine, step=0, samples_consumed=0).loss_scaler)


def train_all(jobs: list[tuple[Path, Setup]]) -> list[Trajectory]:
    return [train_with_deepspeed(directory, setup) for directory, setup in jobs]


def resume_all(jobs: list[tuple[Path, Setup, Cell]]) -> list[Trajectory]:
    return [resume_with_manta(*job) for job in jobs]


def run_by_ranks(function: Any, jobs: list[Any], ranks_of: Any) -> dict[Any, Trajectory]:
    results = {}
    for ranks in sorted({ranks_of(job) for job in jobs}):
        batch = [job for job in jobs if ranks_of(job) == ranks]
        results |= dict(zip(batch, spmd(function, ranks, batch, timeout=1800.0)[0], strict=True))
    return results


def difference(ours: Trajectory, theirs: Trajectory) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True))


def check_resumed(trajectories: dict[tuple[Path, Setup], Trajectory], layouts: list[tuple[int, dict[str, Any]]]) -> None:
    """Resume each setup under the layouts that its precision supports."""
    jobs: dict[Any, Trajectory] = {}
    for (directory, setup), expected in trajectories.items():
        output = directory / "converted"
        position = convert(directory, setup, output)
        assert (position.step, position.samples_consumed) == (setup.saved, setup.saved * GLOBAL_BATCH)
        assert position.optimizer_steps == (setup.saved if setup.optimizer == "adamw" else 0)
        for ranks, parallel in layouts:
            cell = Cell(setup.model, ranks, setup.precision, ParallelConfig(**parallel))
            if setup.precision == "fp32" or cell.parallel.zero:
                jobs[output, setup, cell] = expected
    for job, trajectory in run_by_ranks(resume_all, list(jobs), lambda job: job[2].ranks).items():
        expected = jobs[job]
        assert difference(trajectory, expected) <= BOUNDS[job[1].precision], f"{job[1]} -> {job[2]}"
        assert trajectory.scaler == expected.scaler, f"{job[1]} -> {job[2]}"
        assert expected.scaler is None or expected.scaler["cur_scale"] == 2.0**16  # it was raised meanwhile


def train_setups(directory: Path, setups: list[Setup]) -> dict[tuple[Path, Setup], Trajectory]:
    return run_by_ranks(train_all, [(directory / str(setup), setup) for setup in setups], lambda job: job[1].ranks)


SIMPLE = Setup("llama", 1)
FEW = [
    SIMPLE,
    Setup("llama", 0),
    Setup("LlamaForCausalLM", 2),
    Setup("GPT2LMHeadModel", 3),
]
MORE = [
    Setup("llama", 1, "bf16", optimizer="sgd"),
    Setup("llama", 2, zero_settings={"round_robin_gradients": True}),
    Setup("llama", 3, "fp16"),
]


@pytest.fixture(scope="module")
def trained_few(tmp_path_factory) -> dict[tuple[Path, Setup], Trajectory]:
    return train_setups(tmp_path_factory.mktemp("deepspeed"), FEW)


@pytest.fixture
def copied(trained_few, tmp_path) -> Path:
    """A copy of one checkpoint, for tests that damage it."""
    directory = next(directory for directory, setup in trained_few if setup == SIMPLE)
    return Path(shutil.copytree(directory, tmp_path / "copied"))


OTHER_LAYOUT = [(2, {"tensor": 2, "zero": 1})]


def test_a_deepspeed_run_resumes_under_another_layout(trained_few):
    check_resumed(trained_few, OTHER_LAYOUT)


@pytest.mark.slow
def test_16_bit_and_round_robin_runs_resume(tmp_path):
    check_resumed(train_setups(tmp_path, MORE), OTHER_LAYOUT)


LAYOUTS = [(1, {"zero": 0}), (1, {"zero": 3}), (2, {"zero": 1}), (2, {"zero": 3}), (2, {"tensor": 2, "zero": 1})]
STAGES = [(0, "fp32"), *((zero, precision) for zero in (1, 2, 3) for precision in ("fp32", "bf16", "fp16"))]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["llama", "GPT2LMHeadModel", "LlamaForCausalLM"])
def test_every_stage_precision_and_optimizer_resumes_in_every_layout(tmp_path, name):
    combinations = [(zero, precision, ranks, optimizer) for zero, precision in STAGES for ranks in (1, 2) for optimizer in ("adamw", "sgd")]
    check_resumed(train_setups(tmp_path, [Setup(name, *setup) for setup in combinations]), LAYOUTS)


FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}  # DeepSpeed then wraps ours in another optimizer


@pytest.mark.slow
def test_every_architecture_of_transformers_resumes(tmp_path):
    check_resumed(train_setups(tmp_path, [Setup(name, zero) for name in TRANSFORMERS for zero in (0, 1, 3)]), [(2, {"zero": 1})])


@pytest.mark.slow
def test_other_formats_of_deepspeed_resume(tmp_path):
    setups = [
        Setup("llama", 1, "bf16", settings=FP32_SUMS),
        Setup("own", 1),
        Setup("own", 3),
        Setup("gpt2", 2),  # with dropout
        Setup("llama", 1, zero_settings={"elastic_checkpoint": True}),
        Setup("llama", 2, zero_settings={"offload_optimizer": {"device": "cpu"}}),
        Setup("llama", 3, zero_settings={"offload_optimizer": {"device": "cpu"}}),
    ]
    check_resumed(train_setups(tmp_path, setups), [(2, {"zero": 1})])


@pytest.mark.slow
def test_a_run_saved_before_its_first_step_resumes(tmp_path):
    setups = [Setup("llama", zero, optimizer=optimizer, saved=0) for zero in (0, 1, 2, 3) for optimizer in ("adamw", "sgd")]
    check_resumed(train_setups(tmp_path, setups), [(2, {"zero": 1})])


def shard_of(directory: Path, rank: int) -> Path:
    (file,) = directory.glob(f"*/*_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return file


def test_exchanged_weights_and_lost_state_change_the_losses(trained_few, copied):
    shards = [torch.load(shard_of(copied, rank), weights_only=False) for rank in (0, 1)]  # a file of this test
    first, second = (shard["optimizer_state_dict"] for shard in shards)

    def written(name: str) -> tuple[Path, Setup, Cell]:
        damaged = Path(shutil.copytree(copied, copied.with_name(name)))
        for rank, shard in enumerate(shards):
            torch.save(shard, shard_of(damaged, rank))
        convert(damaged, SIMPLE, damaged / "converted")
        return damaged / "converted", SIMPLE, Cell(SIMPLE.model, 2)

    jobs = [written("unchanged")]
    both = [shard.pop("single_partition_of_fp32_groups") for shard in (first, second)]
    for shard, partition in zip((first, second), reversed(both), strict=True):
        shard["single_partition_of_fp32_groups"] = partition
    jobs.append(written("exchanged"))
    for shard, partition in zip((first, second), both, strict=True):
        shard["single_partition_of_fp32_groups"] = partition
        for state in shard["base_optimizer_state"]["state"].values():
            state["exp_avg"].zero_()
    jobs.append(written("without moments"))
    expected = next(trajectory for (_, setup), trajectory in trained_few.items() if setup == SIMPLE)
    unchanged, exchanged, without_moments = (difference(trajectory, expected) for trajectory in spmd(resume_all, 2, jobs)[0])
    assert unchanged <= 1e-6
    assert exchanged > 1e-3
    assert without_moments > 1e-4


class Hostile:
    """An object that creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.file}'",)


def refused(directory: Path, setup: Setup = SIMPLE, **changes: Any) -> str:
    with pytest.raises(InputError) as raised:
        convert(directory, setup, directory / "never", **changes)
    assert not (directory / "never").exists()
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_missing_truncated_or_misplaced_file_is_named(copied):
    whole = shard_of(copied, 1).read_bytes()
    shard_of(copied, 1).write_bytes(whole[: len(whole) // 2])
    assert f"{shard_of(copied, 1)}: expected a complete file, got one that cannot be read (" in refused(copied)
    shard_of(copied, 1).write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    assert "to match its checksum, got other bytes" in refused(copied)
    assert refused(copied).startswith(f"{shard_of(copied, 1)}: expected ")
    shard_of(copied, 1).write_bytes(shard_of(copied, 0).read_bytes())
    assert "expected the partition of rank 1, got another rank's" in refused(copied)
    missing = shard_of(copied, 1)
    missing.unlink()
    assert refused(copied).startswith(f"{missing}: expected the files of all 2 ranks, got no such file")
    missing.write_bytes(whole)
    surplus = missing.with_name(missing.name.replace("_rank_1_", "_rank_2_", 1))
    surplus.write_bytes(whole)
    assert refused(copied).startswith(f"{surplus}: expected the files of 2 ranks, got one of another save")
    surplus.rename(surplus.with_name("mp_rank_01_model_states.pt"))
    assert "expected a model split by ZeRO only, got tensor, pipeline or expert ranks" in refused(copied)
    surplus.with_name("mp_rank_01_model_states.pt").unlink()
    (copied / "latest").write_text("global_step9")
    assert refused(copied).startswith(f"{copied / 'latest'}: expected the name of a folder beside it, got global_step9")
    (copied / "latest").unlink()
    assert refused(copied).startswith(f"{copied}: expected latest in it, got no such file")
    assert convert(copied / f"global_step{SAVED}", SIMPLE, copied / "from the folder").step == SAVED


@pytest.mark.parametrize("name", ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"])
def test_a_hostile_pickle_is_refused_and_not_run(copied, name):
    file, created = copied / f"global_step{SAVED}" / name, copied / "created"
    content = torch.load(file, weights_only=False)
    torch.save(content | {"client": Hostile(created)}, file)
    assert refused(copied).startswith(f"{file}: expected only tensors, plain values and DeepSpeed's objects, got posix.system")
    assert not created.exists()
    torch.load(file, weights_only=False)
    assert created.exists(), "the pickle is harmless"


def hostile_values() -> list[Any]:
    cycle: list[Any] = []
    cycle.append(cycle)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (3,), check_invariants=True)
    tensors = [torch.zeros(0), torch.zeros(()), torch.ones(3, 3), torch.full((64,), math.nan), torch.zeros(64, dtype=torch.int64), sparse]
    huge = [torch.zeros(1).expand(10**12), torch.empty(10**12, device="meta"), torch.Size([2**40, 2**40]), 2**63, 10**400, -1]
    return [*tensors, *huge, None, True, 0, 1, 1.5, math.nan, "", "x", "\x1b[2J", "x" * 5000, [], {}, [[]], {1: {2: 3}}, cycle]


def convert_hostile(source: Path, count: int) -> None:
    folder = source / f"global_step{SAVED}"
    files = [folder / "mp_rank_00_model_states.pt", *sorted(folder.glob("*optim_states.pt"))]
    originals = {file: (file.read_bytes(), torch.load(file, weights_only=False)) for file in files}
    values, codes = hostile_values(), list[int]()

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    @given(st.integers(0, len(files) - 1), st.lists(EDIT, min_size=1, max_size=3))
    def each(number: int, edits: list[Edit]) -> None:
        file = files[number]
        content, tree = originals[file][0], copy.deepcopy(originals[file][1])
        edit(tree, edits, values)
        torch.save(tree, file)
        output = source / f"converted {len(codes)}"
        outcome = call(lambda: convert(source, SIMPLE, output), seconds=60)
        file.write_bytes(content)
        assert_refused_or_done(outcome, 0, 2)
        assert len(outcome.stderr.splitlines()) <= 1
        codes.append(outcome.code)
        if not outcome.code:
            assert catalog.newest_valid(open_backend(output)) is not None

    each()
    assert codes.count(2) > len(codes) / 4, "many changes matter"


def test_hostile_content_is_refused_in_a_line(copied):
    convert_hostile(copied, 10)


@pytest.mark.slow
def test_much_hostile_content_is_refused_in_a_line(copied):
    convert_hostile(copied, 300)


@pytest.mark.parametrize("kind", ["pipe", "directory", "link to itself", "1 GB of nothing", "small archive of 3 GB"])
@pytest.mark.parametrize("file", ["latest", f"global_step{SAVED}/mp_rank_00_model_states.pt"])
def test_what_is_no_file_of_a_checkpoint_is_named(copied, file, kind):
    path = copied / file
    path.unlink()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "link to itself":
            path.symlink_to(path)
        case "1 GB of nothing":
            with path.open("wb") as stream:
                stream.truncate(1 << 30)
        case _:
            with (
                zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
                archive.open("archive/data/0", "w", force_zip64=True) as record,
            ):
                for _ in range(24):
                    record.write(bytes(1 << 27))
    outcome = call(lambda: load_deepspeed(copied))
    assert_refused_or_done(outcome, 2)
    assert outcome.stderr.startswith(f"manta: {path}: expected ")


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", ".", "..", "x" * 300, "a\0b", "\x1b[2J"])
def test_a_latest_that_leads_elsewhere_is_refused(copied, name):
    (copied / "latest").write_text(name)
    (copied.parent / "elsewhere").mkdir(exist_ok=True)
    outcome = call(lambda: load_deepspeed(copied))
    assert_refused_or_done(outcome, 2)
    assert "latest: expected the name of a folder beside it" in outcome.stderr


def test_another_model_or_optimizer_is_refused(trained_few, copied):
    assert "blocks.0.attention.k_norm.weight: expected nothing, got (8,) (and 28 more)" in refused(copied, Setup("gpt2", 1))
    sgd = optimizer_config("sgd").model_dump(mode="json")
    assert "expected the state of sgd, got exp_avg" in refused(copied, optimizer=sgd)
    by_model = {setup.model: (directory, setup) for directory, setup in trained_few}
    assert "model.layers.1.input_layernorm.weight: expected nothing, got (64,) (and" in refused(
        *by_model["LlamaForCausalLM"], model=TRANSFORMERS["LlamaForCausalLM"].model_copy(update={"layers": 1}).model_dump(mode="json")
    )
    untied = TRANSFORMERS["GPT2LMHeadModel"].model_copy(update={"tied_head": False}).model_dump(mode="json")
    assert "lm_head.weight: expected a separate weight, got one tied to transformer.wte.weight" in refused(
        *by_model["GPT2LMHeadModel"], model=untied
    )


def test_without_zero_an_ambiguous_group_is_refused(trained_few, tmp_path):
    directory = next(directory for directory, setup in trained_few if setup == Setup("llama", 0))
    folder = Path(shutil.copytree(directory / f"global_step{SAVED}", tmp_path / "whole"))
    expected = {name: states["exp_avg"].clone() for name, states in load_deepspeed(folder).parameters.items()}
    content = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    matrices, others = content["optimizer"]["param_groups"]
    numbers, names = matrices["params"], [name for name, weight in content["module"].items() if weight.ndim > 1]
    odd, even = ({**matrices, "params": numbers[first::2]} for first in (0, 1))
    content["optimizer"]["param_groups"] = [odd, even, others]
    torch.save(content, folder / "mp_rank_00_model_states.pt")
    assert "expected one group of the optimizer that fits, got several. Save under ZeRO 1, 2 or 3" in refused(folder)
    for group, of_group in ((odd, names[::2]), (even, names[1::2]), (others, [name for name in expected if name not in names])):
        group["param_names"] = of_group
    torch.save(content, folder / "mp_rank_00_model_states.pt")
    found = load_deepspeed(folder).parameters
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name]["exp_avg"], expected[name]) for name in expected)
    content["module"]["norm.weight"] = torch.ones(65)
    for group in (odd, even, others):
        del group["param_names"]
    torch.save(content, folder / "mp_rank_00_model_states.pt")
    assert "norm.weight: expected [65] next in a group of the optimizer, got other shapes" in refused(folder)


def test_differing_settings_are_reported(copied):
    source = load_deepspeed(copied)
    assert differences(source, training_config(SIMPLE)) == []
    optimizer = optimizer_config("adamw").model_copy(update={"beta2": 0.9, "epsilon": 1e-8, "weight_decay": 0.0, "gradient_clipping": 1.0})
    train = {"steps": 100, "global_batch": 8, "micro_batch": 1}
    assert differences(source, training_config(SIMPLE, optimizer=optimizer.model_dump(mode="json"), train=train)) == [
        "optimizer.beta2: DeepSpeed had 0.95, this config has 0.9",
        "optimizer.epsilon: DeepSpeed had 1e-05, this config has 1e-08",
        "optimizer.weight_decay of embedding.weight: DeepSpeed had 0.1, this config has 0.0",
        "optimizer.gradient_clipping: DeepSpeed had 0.25, this config has 1.0",
        "samples read: DeepSpeed had 8, this config has 16",
    ]


def deepspeed_run(directory: Path, config: TrainingConfig, tokens: int, batches: list[Batch], saved: int) -> list[float]:
    """Train a config with plain DeepSpeed, and only our model and batches."""
    trained = build_model(config.model, vocabulary=tokens, sequence_length=config.data.sequence_length)
    trained.initialize(config.run.seed)
    engine = deepspeed_engine(trained, Setup("llama", 2), config.optimizer, len(batches[0].tokens) // dist.get_world_size())
    losses = []
    for step, whole in enumerate(batches):
        if step == saved:
            engine.save_checkpoint(str(directory), client_state={"note": "a user's"})
        loss = torch.zeros((), dtype=torch.float64)
        for row in range(dist.get_rank(), len(whole.tokens), dist.get_world_size()):
            row_loss = engine(rows(whole, [row]), trained.counts(whole).float().clamp(min=1) / len(whole.tokens)).sum()
            engine.backward(row_loss)
            engine.step()
            loss += row_loss.detach().double()
        dist.all_reduce(loss)
        losses.append(float(loss) / len(whole.tokens))
    return losses


def run_command(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """Run the command in this process: its exit code and stderr."""
    monkeypatch.setattr(sys, "argv", ["manta", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err


@pytest.mark.slow
def test_the_convert_command_writes_a_run_that_resumes(workspace, tmp_path, monkeypatch, capsys):
    overrides = ["run.dir=from deepspeed", "train.steps=8", "schedule.shape=constant", "evaluate.every_steps=100", "optimizer.epsilon=1e-5"]
    config = load(workspace.config_file, overrides)
    with monkeypatch.context() as patch_directory:  # only here: ranks would import the modules of the workspace
        patch_directory.chdir(workspace.directory)
        samples = open_samples(find_prepared(config.data, config.tokenizer), config.data, config.tokenizer, seed=config.run.seed)
    numbers = (np.arange(step * 8, step * 8 + 8) for step in range(8))
    batches = [Batch.from_examples(samples.train(taken, sequence_length=32), seed=config.run.seed) for taken in numbers]
    expected = spmd(deepspeed_run, 2, tmp_path / "theirs", config, samples.tokenizer_vocabulary, batches, 5)[0]
    command = ("checkpoint", "convert", str(tmp_path / "theirs"), str(workspace.config_file), *overrides)
    done = workspace.manta(*command)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    path, advice = done.stdout.splitlines()
    assert path == str(workspace.directory / "from deepspeed/checkpoints/step-00000005")
    assert advice == f"continue with: {shlex.join(['manta', 'train', str(workspace.config_file), *overrides])}"
    assert RunDirectory(workspace.directory / "from deepspeed").manifest().manta
    with monkeypatch.context() as patch_directory:
        patch_directory.chdir(workspace.directory)
        code, message = run_command(patch_directory, capsys, *command)
    assert code == 2
    assert "got a run that has trained already" in message
    done = workspace.manta(*shlex.split(advice.removeprefix("continue with: manta ")))
    assert done.returncode == 0, done.stderr
    lines = read_metrics(workspace.directory / "from deepspeed/metrics.jsonl")
    assert [line["step"] for line in lines] == [6, 7, 8]
    assert [line["train/loss"] for line in lines] == pytest.approx(expected[5:], rel=1e-6)


def test_a_refused_conversion_is_one_line_and_writes_nothing(workspace, copied, monkeypatch, capsys):
    monkeypatch.chdir(workspace.directory)
    file, source = str(workspace.config_file), str(copied)
    for arguments, expected in (
        ([str(copied.parent), file], "expected latest in it, got no such file. Name a directory that engine.save_checkpoint wrote"),
        ([source, file], "blocks.0.attention.k_norm.weight: expected nothing, got (8,) (and 5 more)"),
        ([source, file, "--names", "huggingface"], "blocks.0.attention.k_norm.weight: expected nothing, got (8,) (and 44 more)"),
        ([source, file, "--names", "mine"], "--names: expected manta or huggingface, got 'mine'"),
        ([source, file, "train.steps=1"], f"train.steps: expected at least 2, the step of {copied}/global_step2, got 1"),
        ([source, file, "run.start_from=imported/gpt2"], "run.start_from: expected none, got"),
        ([source, str(copied / "none.yaml")], "none.yaml: expected a config, got an error: No such file"),
    ):
        code, message = run_command(monkeypatch, capsys, "checkpoint", "convert", *arguments, "run.dir=never converted")
        assert (code, len(message.splitlines())) == (2, 1), message
        assert expected in message
        assert not (workspace.directory / "never converted").exists()
