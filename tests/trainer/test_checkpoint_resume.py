"""A run resumed from any checkpoint is bitwise the uninterrupted run, under the same layout."""

import shutil
from pathlib import Path

import pytest

from manta.trainer.checkpoint.storage import open_backend
from manta.trainer.metrics import read_metrics

STEPS, WARMUP = 24, 16
# Each step has its own dropout, the learning rate still rises at each of the steps to resume from, and a z-loss of hundreds overflows
# fp16 gradients at first, so that the loss scale changes.
COMMON = (
    f"train.steps={STEPS}",
    f"schedule.warmup_steps={WARMUP}",
    "precision=fp16",
    "model.z_loss=10",
    "model.dropout=0.1",
    "checkpoint.every_steps=1",
    "checkpoint.keep=1000",
)
FAMILIES = {
    "gpt": ("model.preset=gpt2-tiny", "model.attention_dropout=0.1"),
    "bert": ("model.preset=bert-tiny", "model.kv_heads=null", "data.objective=masked", "tokenizer.algorithm=wordpiece"),
    "moe": ("model.preset=moe-tiny", "parallel.expert=2"),
}
EXACT = ("train/loss", "grad_norm", "learning_rate", "data/digest", "eval/loss", "loss_scale", "skipped")


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_resumed_from_any_step_is_the_uninterrupted_run(workspace, family, asynchronous):
    run = f"{family} uninterrupted {asynchronous}"
    workspace.train(run, *COMMON, *FAMILIES[family], f"checkpoint.asynchronous={asynchronous}")
    finished_run = read_metrics(workspace.directory / run / "metrics.jsonl")
    skipped = [line["step"] for line in finished_run if line["skipped"]]
    assert skipped, "no gradient overflowed"
    assert len(skipped) < STEPS / 2
    for step in (skipped[0], skipped[-1], WARMUP - 1):
        copy = Path(shutil.copytree(workspace.directory / run, workspace.directory / f"{run} {step}"))
        for name in open_backend(copy / "checkpoints").names():
            if int(name[5:]) > step:
                shutil.rmtree(copy / "checkpoints" / name)
        done = workspace.manta("resume", copy.name)
        assert done.returncode == 0, done.stderr
        resumed = read_metrics(copy / "metrics.jsonl")
        assert [line["attempt"] for line in resumed] == [1] * step + [2] * (STEPS - step)
        for expected, line in zip(finished_run, resumed, strict=True):
            assert {key: line.get(key) for key in EXACT} == {key: expected.get(key) for key in EXACT}, f"from step {step}"
