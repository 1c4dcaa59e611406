"""A run that comes back from its checkpoint is, bit by bit, the run that never stopped: whole runs, under the layout that they had."""

import shutil
from pathlib import Path

import pytest

from manta.trainer.checkpoint.backend import open_backend
from manta.trainer.metrics import read_metrics

STEPS, WARMUP = 24, 16
# Dropout is drawn anew in each step, the learning rate still rises at each of the steps gone back to, and a z-loss of hundreds has
# gradients that fp16 can not hold at first: the loss scale is on its way.
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
def test_a_run_gone_back_to_any_step_is_the_uninterrupted_run(workspace, family, asynchronous):
    run = f"{family} undisturbed {asynchronous}"
    workspace.train(run, *COMMON, *FAMILIES[family], f"checkpoint.asynchronous={asynchronous}")
    finished_run = read_metrics(workspace.directory / run / "metrics.jsonl")
    skipped = [line["step"] for line in finished_run if line["skipped"]]
    assert skipped, "no gradient overflowed"
    assert len(skipped) < STEPS / 2
    for step in (skipped[0], skipped[-1], WARMUP - 1):
        home = Path(shutil.copytree(workspace.directory / run, workspace.directory / f"{run} {step}"))
        for name in open_backend(home / "checkpoints").names():
            if int(name[5:]) > step:
                shutil.rmtree(home / "checkpoints" / name)
        done = workspace.manta("resume", home.name)
        assert done.returncode == 0, done.stderr
        again = read_metrics(home / "metrics.jsonl")
        assert [line["attempt"] for line in again] == [1] * step + [2] * (STEPS - step)
        for then, now in zip(finished_run, again, strict=True):
            assert {key: now.get(key) for key in EXACT} == {key: then.get(key) for key in EXACT}, f"from step {step}"
