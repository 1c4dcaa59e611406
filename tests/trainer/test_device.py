"""A rank computes on the GPU if there is one, and fails if torch cannot use it."""

import pytest
import torch

from manta.data.errors import InputError
from manta.trainer.hardware import check_gpus, device_type


def test_ds_accelerator_selects_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert device_type() == "cpu"
    monkeypatch.delenv("DS_ACCELERATOR")
    assert device_type() == "cuda"


@pytest.mark.parametrize(
    ("visible", "remedy"), [(None, "Install torch's CUDA build and a recent driver"), ("0,0", "Correct CUDA_VISIBLE_DEVICES=0,0")]
)
def test_gpus_that_torch_cannot_use_are_an_error(visible, remedy, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "null"):
        (tmp_path / name).touch()
    with pytest.raises(
        InputError, match=rf"expected torch to find this machine's 2 GPUs, got none from torch .*\. {remedy}, or train on the CPU"
    ):
        check_gpus(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_gpus(tmp_path)


@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_gpus_are_ignored(visible, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (tmp_path / "nvidia0").touch()
    check_gpus(tmp_path)
