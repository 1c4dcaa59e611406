"""A rank computes on the GPU that is there, and says so where torch can not."""

import pytest
import torch

from manta.data.errors import InputError
from manta.trainer.hardware.device import check_gpus, device_type


def test_deepspeed_s_word_for_the_cpu_holds_for_all_of_us(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert device_type() == "cpu"
    monkeypatch.delenv("DS_ACCELERATOR")
    assert device_type() == "cuda"


@pytest.mark.parametrize("visible", [None, "0"])
def test_gpus_that_torch_does_not_see_are_told(visible, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "null"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"this machine has 2 GPUs, and torch .* sees none of them; install torch's CUDA build"):
        check_gpus(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_gpus(tmp_path)


@pytest.mark.parametrize("visible", ["", "-1"])
def test_gpus_that_are_hidden_are_not_missed(visible, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (tmp_path / "nvidia0").touch()
    check_gpus(tmp_path)
