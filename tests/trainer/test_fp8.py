"""Products in 8 bits: refused where they can not be had, and a token's result hangs on no other token. Parity is proven on the table."""

import pytest
import torch

from manta.data.errors import InputError
from manta.trainer.config.model import ExpertsConfig, ModelConfig
from manta.trainer.config.supported import refusal
from manta.trainer.config.training import ParallelConfig
from manta.trainer.model.layers import MLP
from manta.trainer.parallel.fp8 import ask_for_gpu, multiply_in_fp8

SIZES = {"layers": 2, "width": 64, "heads": 4, "mlp_width": 128}


def layer() -> MLP:
    torch.manual_seed(0)
    made = MLP(64, 128, approximate="tanh").bfloat16()
    multiply_in_fp8(made, emulate=True)
    return made


def test_products_are_in_8_bits():
    made, exact = layer(), MLP(64, 128, approximate="tanh").bfloat16()
    exact.load_state_dict(made.state_dict())
    x = torch.randn(4, 64).bfloat16()
    difference = (made(x) - exact(x)).float().norm() / exact(x).float().norm()
    assert 5e-3 < difference < 1e-1, "e4m3 keeps four bits: it is neither bf16 nor noise"


def test_a_tokens_result_and_gradient_hang_on_no_other_token():
    made, x = layer(), torch.randn(8, 64).bfloat16()
    x[4:] *= 1000  # a scale for the whole tensor would leave the others no bits
    together, alone = x.clone().requires_grad_(), x[:4].clone().requires_grad_()
    ours, theirs = made(together), made(alone)
    assert torch.equal(ours[:4], theirs)
    ours.sum().backward()
    theirs.sum().backward()
    assert torch.equal(together.grad[:4], alone.grad)


@pytest.mark.parametrize(
    ("model", "parallel", "told"),
    [
        ({}, {"zero": 0}, "parallel.zero: got 0, which goes wrong in fp8"),
        ({}, {"zero": 3}, "parallel.zero: got 3, and fp8 would keep whole"),
        ({}, {"tensor": 2}, "parallel.tensor: got 2, not proven in fp8"),
        ({"mlp_width": 100}, {}, "model.mlp_width: got 100, wants a multiple of 16 in fp8"),
        ({"heads": 8, "kv_heads": 1, "head_width": 8}, {}, "model.kv_heads x head_width: got 8, wants a multiple of 16 in fp8"),
        ({"experts": ExpertsConfig(experts=4, top_k=2, width=24, shared=1)}, {}, "model.experts.shared x width: got 24"),
        ({"family": "mine:Model"}, {}, "precision: got fp8, not proven with a model of your own"),
    ],
)
def test_what_is_not_run_in_fp8_gives_its_reason(model, parallel, told):
    config = ModelConfig(**{**SIZES, **model})
    assert refusal(config, ParallelConfig(**parallel), "fp8", sequence_length=32).startswith(told)
    assert refusal(ModelConfig(**SIZES), ParallelConfig(), "fp8", sequence_length=32) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU on this machine")
def test_a_run_without_a_gpu_is_refused_before_anything_is_made(workspace):
    done = workspace.manta("train", workspace.config_file.name, "run.dir=never", "precision=fp8")
    assert (done.returncode, done.stderr) == (2, "manta: precision: got fp8, which wants GPUs, and this machine has none; use bf16\n")
    assert not (workspace.directory / "never").exists()


def test_without_a_gpu_that_has_them_they_are_refused(monkeypatch):
    with pytest.raises(
        InputError, match=r"got fp8, which wants a GPU of compute capability 9\.0 or newer, and this rank has none; use bf16"
    ):
        ask_for_gpu(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an A100")
    with pytest.raises(InputError, match=r"an A100 has 8\.0; use bf16"):
        ask_for_gpu(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("manta.trainer.parallel.fp8.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install torchao, or use bf16"):
        ask_for_gpu(torch.device("cuda"))
