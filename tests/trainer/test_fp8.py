"""fp8 products: refused without a suitable GPU, and a token's result depends on no other token. The parity table covers parity."""

import pytest
import torch

from manta.data.errors import InputError
from manta.trainer.config.model import ExpertsConfig, ModelConfig
from manta.trainer.config.sections import ParallelConfig, TrainConfig
from manta.trainer.config.supported import unsupported
from manta.trainer.model.layers import MLP
from manta.trainer.parallel.fp8 import convert_to_fp8, require_fp8_gpu

TRAIN = TrainConfig(steps=1, global_batch=1, micro_batch=1)
SIZES = {"layers": 2, "width": 64, "heads": 4, "mlp_width": 128}


def fp8_layer() -> MLP:
    torch.manual_seed(0)
    layer = MLP(64, 128, approximate="tanh").bfloat16()
    convert_to_fp8(layer, emulate=True)
    return layer


def test_products_are_in_fp8():
    layer, exact = fp8_layer(), MLP(64, 128, approximate="tanh").bfloat16()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(4, 64).bfloat16()
    difference = (layer(x) - exact(x)).float().norm() / exact(x).float().norm()
    assert 5e-3 < difference < 1e-1, "e4m3 keeps four bits: it is neither bf16 nor noise"


def test_a_tokens_result_and_gradient_depend_on_no_other_token():
    layer, x = fp8_layer(), torch.randn(8, 64).bfloat16()
    x[4:] *= 1000  # one scale for the whole tensor would leave the other tokens no bits
    batched, alone = x.clone().requires_grad_(), x[:4].clone().requires_grad_()
    batched_output, output = layer(batched), layer(alone)
    assert torch.equal(batched_output[:4], output)
    batched_output.sum().backward()
    output.sum().backward()
    assert torch.equal(batched.grad[:4], alone.grad)


@pytest.mark.parametrize(
    ("model", "parallel", "reason"),
    [
        ({}, {"zero": 0}, "parallel.zero: expected 1 or 2 in fp8, because DeepSpeed without ZeRO"),
        ({}, {"zero": 3}, "parallel.zero: expected 1 or 2 in fp8, which keeps the weights"),
        ({}, {"tensor": 2}, "parallel.tensor: expected 1 in fp8"),
        ({"mlp_width": 100}, {}, "model.mlp_width: expected a multiple of 16 in fp8, got 100"),
        ({"heads": 8, "kv_heads": 1, "head_width": 8}, {}, "model.kv_heads x head_width: expected a multiple of 16 in fp8, got 8"),
        (
            {"experts": ExpertsConfig(experts=4, top_k=2, width=24, shared=1)},
            {},
            "model.experts.shared x width: expected a multiple of 16 in fp8, got 24",
        ),
        ({"family": "mine:Model"}, {}, "precision: expected another one for your own model, which is not proven in fp8"),
    ],
)
def test_unsupported_fp8_configs_are_refused(model, parallel, reason):
    config = ModelConfig(**{**SIZES, **model})
    assert str(next(unsupported(config, ParallelConfig(**parallel), "fp8", TRAIN, lengths=[32]))).startswith(reason)
    assert not list(unsupported(ModelConfig(**SIZES), ParallelConfig(), "fp8", TRAIN, lengths=[32]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU on this machine")
def test_an_fp8_run_without_a_gpu_is_refused_at_once(workspace):
    done = workspace.manta("train", workspace.config_file.name, "run.dir=never", "precision=fp8")
    assert (done.returncode, done.stderr) == (2, "manta: precision: expected another one on a machine without GPUs, got fp8. Use bf16.\n")
    assert not (workspace.directory / "never").exists()


def test_fp8_needs_a_hopper_gpu_and_torchao(monkeypatch):
    with pytest.raises(InputError, match=r"expected a GPU of compute capability 9\.0 or newer for fp8, got no GPU on this rank\. Use bf16"):
        require_fp8_gpu(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an A100")
    with pytest.raises(InputError, match=r"got an A100 with 8\.0\. Use bf16"):
        require_fp8_gpu(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("manta.trainer.parallel.fp8.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"expected torchao for fp8, got none\. Run pip install 'manta\[fp8\]', or use bf16"):
        require_fp8_gpu(torch.device("cuda"))
