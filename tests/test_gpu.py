"""What only a GPU can show. On a machine without one these skip, and say so."""

import json

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_one_gpu_trains_the_124m_preset_with_the_same_command(case):
    overrides = ["model={preset: gpt-124m}", "precision=bf16", "train.steps=6", "schedule.warmup_steps=2", "cluster={}"]
    case.train("on a gpu", *overrides)
    lines = [json.loads(text) for text in (case.home / "on a gpu/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert lines[-1]["memory/peak"] > 124e6 * 2


def test_a_gpu_run_comes_back_from_its_checkpoint(case):
    case.train("gpu again", "precision=bf16", "train.steps=12", "cluster={}", "schedule.shape=constant")
    done = case.manta("resume", "gpu again", "train.steps=18")
    assert done.returncode == 0, done.stderr


def test_the_loss_on_a_gpu_is_the_loss_on_a_cpu():
    from manta.trainer.config import ModelConfig
    from manta.trainer.model.gpt import GPT

    model = GPT(ModelConfig(layers=2, width=64, heads=4, kv_heads=2, mlp_width=128), vocabulary=250)
    model.initialize(1)
    tokens = torch.randint(0, 250, (4, 65), generator=torch.Generator().manual_seed(0))
    on_cpu = model(tokens[:, :-1], tokens[:, 1:])
    on_gpu = model.cuda()(tokens[:, :-1].cuda(), tokens[:, 1:].cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-4)
