"""Names in a model never change: initial weights and dropout masks hash them, checkpoints store them."""

from pathlib import Path

import pytest
import torch
import yaml

from manta.trainer.config.model import ModelConfig
from manta.trainer.model.build import build_model
from manta.trainer.model.dropout import AttentionDropout, Dropout

GOLDEN = yaml.safe_load(Path(__file__).with_name("golden_parameter_names.yaml").read_text())
SIZE = {"layers": 1, "width": 64, "heads": 8, "dropout": 0.1, "attention_dropout": 0.1, "tied_head": False}


@pytest.mark.parametrize("family", GOLDEN)
def test_names_of_parameters_and_dropouts_are_unchanged(family):
    golden = GOLDEN[family]
    with torch.device("meta"):
        model = build_model(ModelConfig.model_validate(SIZE | golden["config"]), vocabulary=250, sequence_length=32)
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == golden["parameters"]
    assert [name for name, module in model.named_modules() if isinstance(module, Dropout | AttentionDropout)] == golden["dropouts"]
