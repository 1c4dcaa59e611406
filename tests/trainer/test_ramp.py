"""Batches that grow and sequences that lengthen: as one plain process computes them, the same under every layout and after a stop."""

import json
import os
import shutil
import signal
import statistics
import threading
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import chdir, closing
from dataclasses import replace
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xxhash
from parity import (
    BOUNDS,
    DTYPES,
    LENGTH,
    LINEAR,
    OPTIMIZERS,
    RATES,
    Cell,
    Trace,
    batch,
    gather_masters,
    model,
    movements,
    optimizer_config,
    rows,
    small_buckets,
)
from runs import assert_same_losses, events, lines, losses, resume, wait_for_step
from spmd import spmd
from test_compile import needs_compiler

from manta.data.errors import InputError
from manta.data.hashing import hashed
from manta.data.prepare.prepare import find_prepared
from manta.data.sampling.samples import Samples
from manta.data.sampling.step_samples import Timeline
from manta.launch import config as configs
from manta.launch.run.start import step_text
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.storage import open_backend
from manta.trainer.config.sections import BatchConfig, ParallelConfig, TrainConfig
from manta.trainer.dataloader.batch import _NOISE, Batch
from manta.trainer.dataloader.loader import DataLoader
from manta.trainer.dist.layout import Layout, layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine import deepspeed as engines
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.optim.optimizers import build_optimizer

SHAPES = [(4, 8), (4, 8), (12, 16), (8, 16), (8, 32), (16, 32), (12, 32), (4, 32)]
"""Of a step: global batch, and the length that its samples are cut to. Turns are 1, 1, 3, 2, 2, 4, 3, 1 under every layout."""
BATCHES = [global_batch for global_batch, _ in SHAPES]
TURN = 4  # samples, over all ranks

CELLS = [
    Cell("gpt2", 1, "fp32", ParallelConfig(zero=1)),
    Cell("gpt2", 2, "fp32", ParallelConfig(zero=0)),
    Cell("gpt2", 2, "bf16", ParallelConfig(zero=1)),
    Cell("gpt2", 2, "fp32", ParallelConfig(zero=1, sequence=2)),
    Cell("moe", 2, "fp32", ParallelConfig(zero=1, expert=2)),
]
MORE = (
    [
        Cell("llama", 2, "fp32", ParallelConfig(zero=2, offload=True)),
        Cell("llama", 2, "bf16", ParallelConfig(zero=3)),
        Cell("llama", 2, "fp16", ParallelConfig(zero=2), "full"),
    ]
    + [
        Cell("gpt2", ranks, precision, ParallelConfig(zero=zero, offload=offload))
        for ranks in (1, 2, 4)
        for zero, offload in ((0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True))
        for precision in ("fp32", "bf16")
        if zero or precision == "fp32"
    ]
    + [Cell("llama", 4, "fp32", ParallelConfig(zero=3, tensor=2)), Cell("moe", 4, "fp32", ParallelConfig(zero=2, expert=2, sequence=2))]
)


def shorter(whole: Batch, length: int) -> Batch:
    """Return each sample in parts, each part with separate positions and keys."""
    parts, count = LENGTH // length, len(whole.tokens)
    assert whole.documents is not None
    return replace(
        whole,
        tokens=whole.tokens.reshape(-1, length),
        targets=whole.targets.reshape(-1, length),
        positions=torch.arange(length).expand(count * parts, length),
        documents=whole.documents.clamp(min=0).reshape(-1, length),  # of a part, all may be padding: it is read, and predicts nothing
        keys=(whole.keys[:, None] * parts + torch.arange(parts)).reshape(-1),
    )


def plain(cell: Cell, optimizer: str) -> Trace:
    """Train in one process without DeepSpeed, as `parity.plain` does, with the batch and sequence length of each step."""
    trained, masters = model(cell.model).to(DTYPES.get(cell.precision, torch.float32)), model(cell.model)
    masters.load_state_dict({key: weight.float() for key, weight in trained.state_dict().items()})
    config = optimizer_config(optimizer, cell.precision)
    steps = build_optimizer(masters.parameters(), config)
    scale = 2.0**16 if cell.precision == "fp16" else 1.0
    losses_by_step, norms = [], []
    for step, (global_batch, length) in enumerate(SHAPES):
        trained.zero_grad()
        whole = rows(batch(cell.model, step), range(global_batch))
        counts = trained.counts(shorter(whole, length)).float().clamp(min=1)
        loss = 0.0
        for chunk in torch.arange(global_batch).split(TURN):
            terms = trained(shorter(rows(whole, chunk), length), counts)
            (terms.sum() * scale).backward()
            loss += float(terms.detach().sum())
        for master, weight in zip(masters.parameters(), trained.parameters(), strict=True):
            master.grad = weight.grad.float() / scale
        losses_by_step.append(loss)
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.parameters(), config.gradient_clipping)))
        steps.step()
        for _, router in trained.routers():
            router.end_step(router.load.float())
        with torch.no_grad():
            for master, weight in zip(masters.parameters(), trained.parameters(), strict=True):
                weight.copy_(master)
    return Trace(losses_by_step, norms, movements(cell.model, cell.precision, dict(masters.named_parameters())))


def under(cell: Cell, optimizer: str, fault: Callable[[Engine], None] | None = None, *, compiled: bool = False) -> Trace:
    """Train the same in DeepSpeed, on this rank's share; with a fault, for controls."""
    torch.nn.functional.linear = LINEAR
    world = World.from_environment()
    data = world.size // (cell.parallel.tensor * cell.parallel.sequence)
    stages = tuple(BatchConfig(from_tokens=at, global_batch=global_batch) for at, global_batch in enumerate(BATCHES))
    train = TrainConfig(steps=len(SHAPES), global_batch=BATCHES[-1], batch_ramp=stages, micro_batch=TURN // data)
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
    losses_by_step, norms = [], []
    for step, (global_batch, length) in enumerate(SHAPES):
        whole = batch(cell.model, step)
        taken = (
            layout.samples_of_rank(first=0, micro_step=micro_step, rank=mesh.data_rank)
            for micro_step in range(layout.accumulation(global_batch))
        )
        outcome = engine.step([shorter(rows(whole, numbers), length) for numbers in taken], learning_rate=RATES[optimizer])
        assert not outcome.skipped
        terms = outcome.terms.double()
        dist.all_reduce(terms, group=mesh.replicas)
        losses_by_step.append(float(terms.sum()))
        norms.append(outcome.grad_norm)
    weights, drifted = gather_masters(engine)
    return Trace(losses_by_step, norms, movements(cell.model, cell.precision, weights), drifted)


def of_both(run: Callable[..., Trace], some: list[Cell]) -> list[dict[str, Trace]]:
    return [{optimizer: run(cell, optimizer) for optimizer in OPTIMIZERS} for cell in some]


@cache
def reference(name: str, precision: str) -> dict[str, Trace]:
    return spmd(of_both, 1, plain, [Cell(name, 1, precision)])[0][0]


@pytest.mark.parametrize("cell", [*CELLS, *(pytest.param(cell, marks=pytest.mark.slow) for cell in MORE)], ids=str)
def test_ramped_steps_equal_one_plain_process(cell):
    assert cell.refusal is None
    for traces in spmd(of_both, cell.ranks, under, [cell]):
        for optimizer in OPTIMIZERS:
            difference = traces[0][optimizer].difference(reference(cell.model, cell.precision)[optimizer])
            assert difference.within(BOUNDS[cell.precision]), difference


def ignores_boundary(engine: Engine) -> None:
    """DeepSpeed ends a step at every second micro batch."""
    engine.deepspeed.set_gradient_accumulation_boundary = lambda _: None
    engine.deepspeed._config.gradient_accumulation_steps = 2


def divides_twice(engine: Engine) -> None:
    """DeepSpeed divides by the configured accumulation, although the boundary is set."""
    engine.deepspeed._config.gradient_accumulation_steps = 2
    backward = engine.deepspeed.backward
    engine.deepspeed.backward = lambda loss, *, scale_wrt_gas: backward(loss, scale_wrt_gas=not scale_wrt_gas)


@pytest.mark.parametrize("zero", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
@pytest.mark.parametrize("fault", [ignores_boundary, divides_twice])
def test_the_comparison_notices_a_fault(fault, zero):
    cell = Cell("gpt2", 2, "fp32", ParallelConfig(zero=zero))
    traces = spmd(of_both, 2, partial(under, fault=fault), [cell])[0][0]
    for optimizer in OPTIMIZERS:
        assert not traces[optimizer].difference(reference("gpt2", "fp32")[optimizer]).within(BOUNDS["fp32"])


def compiled(cell: Cell) -> tuple[Trace, int]:
    trace = under(cell, "adamw", compiled=True)
    from torch._dynamo.utils import counters

    return trace, counters["stats"]["unique_graphs"]


@needs_compiler
@pytest.mark.slow
def test_blocks_are_compiled_once_for_each_length():
    for trace, graphs in spmd(compiled, 2, Cell("gpt2", 2), timeout=240.0):
        assert trace.difference(reference("gpt2", "fp32")["adamw"]).within(BOUNDS["fp32"])
        assert graphs == len({length for _, length in SHAPES})


RAMP = (
    "train.micro_batch=1",
    "train.batch_ramp=[{global_batch: 2}, {from_tokens: 600, global_batch: 6}, {from_tokens: 2.4e3, global_batch: 8}]",
    "data.curriculum=[{sequence_length: 8}, {from_tokens: 1000, sequence_length: 16}, {from_tokens: 4000, sequence_length: 32}]",
)
PHASES = [(0, 0, 2, 8), (10, 20, 6, 8), (12, 32, 6, 16), (20, 80, 8, 16), (26, 128, 8, 32)]
"""First step, its first sample, global batch, sequence length; of forty steps."""


def opened(workspace, *overrides: str) -> tuple[configs.RunConfig, Samples]:
    config = configs.load(workspace.config_file, overrides)
    with chdir(workspace.directory):
        data = config.data.model_copy(update={"directory": str(Path(config.data.directory).absolute())})
        prepared = find_prepared(data, config.tokenizer)
        assert prepared is not None
        return config, Samples(prepared, data, config.tokenizer, seed=config.run.seed)


def test_the_config_fixes_each_steps_samples_and_their_length(workspace):
    timeline = configs.load(workspace.config_file, RAMP).timeline()
    assert list(map(attrgetter("first_step", "first_sample", "global_batch", "sequence_length"), timeline.stages)) == PHASES
    assert [phase.global_batch for phase in configs.load(workspace.config_file).timeline().stages] == [8]


def test_a_shorter_sequence_is_a_part_of_its_sample(workspace):
    _, samples = opened(workspace)
    numbers = np.array([5, 900, 7])
    whole, cut = samples.train(numbers), samples.train(numbers, sequence_length=8)
    assert cut.tokens.shape == cut.targets.shape == (12, 8)
    for name in ("tokens", "targets"):
        assert np.array_equal(getattr(cut, name).reshape(3, 32), getattr(whole, name))
    assert np.array_equal(cut.positions, np.tile(np.arange(8), (12, 1)))
    assert cut.samples.tolist() == np.repeat(numbers, 4).tolist()
    again = samples.train(numbers, sequence_length=32)
    assert again.part is None
    assert np.array_equal(again.tokens, whole.tokens)


def test_shorter_sequences_keep_documents_apart(workspace):
    _, samples = opened(workspace, "data.separate_documents=true")
    whole, cut = samples.train(np.arange(400)), samples.train(np.arange(400), sequence_length=8)
    assert cut.documents.max() > 0
    assert np.array_equal(cut.targets.reshape(400, 32), whole.targets)
    is_boundary = (np.diff(cut.documents, axis=1) == 1) | (np.diff(cut.documents, axis=1) == 0)
    assert is_boundary.all()
    assert (cut.documents[:, 0] == 0).all()
    assert (cut.positions[:, 0] == 0).all()
    assert np.array_equal(np.diff(cut.documents, axis=1) == 1, cut.positions[:, 1:] == 0)


def test_each_part_of_a_sample_drops_other_channels(workspace):
    _, samples = opened(workspace)
    numbers = np.arange(200)
    parts, wholes = (Batch.from_examples(samples.train(numbers, sequence_length=length), seed=5).keys for length in (8, 32))
    assert len(torch.cat([parts, wholes]).unique()) == 200 * (4 + 1)
    assert torch.equal(wholes, torch.from_numpy(hashed(5, _NOISE, numbers).view(np.int64))), "those of whole samples are what they were"


def reader_of(workspace, *overrides: str) -> tuple[DataLoader, Samples, Timeline, Layout]:
    """Return the data loader of the second of two ranks."""
    config, samples = opened(workspace, *RAMP, *overrides)
    timeline, layout = config.timeline(), layout_for(config.train, ParallelConfig(), 2)
    reader = DataLoader(samples, timeline, layout, rank=1, seed=5, steps=config.train.steps, device=torch.device("cpu"))
    return reader, samples, timeline, layout


def test_the_next_step_is_prefetched(workspace):
    reader, samples, timeline, layout = reader_of(workspace)
    with closing(reader):
        for step in range(3, 40):
            microbatches, phase = list(reader.step(step)), timeline.stage(step)
            assert len(microbatches) == layout.accumulation(phase.global_batch)
            for micro_step, microbatch in enumerate(microbatches):
                numbers = layout.samples_of_rank(first=timeline.first_sample(step), micro_step=micro_step, rank=1)
                wanted = Batch.from_examples(samples.train(numbers, sequence_length=phase.sequence_length), seed=5)
                assert torch.equal(microbatch.batch.tokens, wanted.tokens)
                assert torch.equal(microbatch.batch.keys, wanted.keys)
            if step + 1 < 40:
                prefetched = wait(reader._prefetched[step + 1], timeout=10)
                assert len(prefetched.done) == layout.accumulation(timeline.stage(step + 1).global_batch)
            else:
                assert not reader._prefetched, "nothing is read beyond the last step"


def test_a_read_error_is_raised_and_the_thread_ends(workspace, tmp_path):
    shutil.copytree(workspace.directory / "corpora", tmp_path / "corpora")
    reader, *_ = reader_of(workspace, f"data.directory={tmp_path / 'corpora'}")
    for shard in tmp_path.glob("corpora/**/*.bin"):
        shard.unlink()
    before = set(threading.enumerate())
    with closing(reader), pytest.raises(InputError, match=r"\.bin: missing"):
        list(reader.step(0))
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert set(threading.enumerate()) == before


@pytest.fixture(scope="module")
def ramped(workspace) -> str:
    workspace.train("ramped", *RAMP)
    return "ramped"


def digest(samples: Samples, numbers: np.ndarray, length: int) -> int:
    read = samples.train(numbers, sequence_length=length)
    hashes = (xxhash.xxh3_64_intdigest(np.stack(both).tobytes()) for both in zip(read.tokens, read.targets, strict=True))
    return sum(number % 2**32 for number in hashes) % 2**32


@pytest.mark.slow
def test_a_run_reads_the_samples_of_its_timeline(workspace, ramped):
    config, samples = opened(workspace, *RAMP)
    timeline = config.timeline()
    logged = lines(workspace, ramped)
    assert [line["step"] for line in logged] == list(range(1, 41))
    for line in logged:
        phase, first = timeline.stage(line["step"] - 1), timeline.first_sample(line["step"] - 1)
        assert (line["global_batch"], line["sequence_length"]) == (phase.global_batch, phase.sequence_length)
        assert line["tokens"] == 32 * (first + phase.global_batch)
        assert line["data/digest"] == digest(samples, np.arange(first, first + phase.global_batch), phase.sequence_length)
    saved = catalog.newest_valid(open_backend(workspace.directory / ramped / "checkpoints"))
    assert (saved.progress.step, saved.progress.samples_consumed) == (40, 128 + 14 * 8)


@pytest.mark.slow
def test_status_shows_the_stage(workspace, ramped):
    status = json.loads(workspace.manta("status", ramped, "--json").stdout)
    assert (status["global_batch"], status["sequence_length"], status["tokens"]) == (8, 32, 240 * 32)
    assert "8 samples, in sequences of 32 tokens" in workspace.manta("status", ramped).stdout


def test_the_start_prints_all_stages(workspace):
    config = configs.load(workspace.config_file, RAMP)
    assert step_text(config, layout_for(config.train, ParallelConfig(), 2)) == (
        "2 ranks x micro batch 1 x accumulation 1 = 8 sequences of 8 tokens per step,"
        " from step 11 accumulation 3 = 24 sequences of 8 tokens per step,"
        " from step 13 accumulation 3 = 12 sequences of 16 tokens per step,"
        " from step 21 accumulation 4 = 16 sequences of 16 tokens per step,"
        " from step 27 accumulation 4 = 8 sequences of 32 tokens per step"
    )


@pytest.mark.slow
def test_a_rank_killed_during_a_ramp_changes_no_loss(workspace, ramped):
    with workspace.start("train", str(workspace.config_file), "run.dir=ramp killed", *RAMP, "cluster.hot_standby=true") as running:
        wait_for_step(workspace, "ramp killed", 15, running)
        os.kill(next(e for e in events(workspace, "ramp killed") if e["event"] == "attempt-started")["ranks"][1]["pid"], signal.SIGKILL)
        assert running.wait(90) == 0, running.stderr.read()
        running.communicate()
    assert [line["attempt"] for line in lines(workspace, "ramp killed")][-1] == 2
    assert losses(workspace, "ramp killed") == losses(workspace, ramped)  # bitwise
    assert [line["data/digest"] for line in lines(workspace, "ramp killed")] == [line["data/digest"] for line in lines(workspace, ramped)]


@pytest.mark.slow
def test_a_run_stopped_during_a_ramp_resumes_on_one_rank(workspace, ramped):
    with workspace.start("train", str(workspace.config_file), "run.dir=ramp stopped", *RAMP) as running:
        wait_for_step(workspace, "ramp stopped", 11, running)
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 75, running.stderr.read()
        running.communicate()
    stopped = lines(workspace, "ramp stopped")[-1]["step"]
    assert 10 < stopped < 26, "neither the first phase nor the last"
    again = resume(workspace, "ramp stopped", "cluster.ranks_per_node=1")
    assert [line["step"] for line in again] == list(range(stopped + 1, 41))
    assert {line["world_size"] for line in again} == {1}
    assert_same_losses(again, lines(workspace, ramped))


@pytest.mark.slow
def test_another_ramp_is_another_run(workspace, ramped):
    refused = workspace.train(ramped, *RAMP[:1], RAMP[2], code=2)
    assert "train.batch_ramp" in refused.stderr


@pytest.mark.slow
def test_a_run_rarely_waits_for_data(workspace, ramped):
    """A step takes 10 ms here, and other processes may share the cores: the median excludes their delays."""
    measured = lines(workspace, ramped)[1:]  # nothing is computed while the first step is read
    assert statistics.median(line["data_wait"] / line["step_time"] for line in measured) <= 0.01
