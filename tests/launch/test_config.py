"""Configs are read as users write them; presets, overrides and docs/config.md agree with the code."""

from pathlib import Path

import pytest
import torch
import yaml
from config_reference import reference

from manta.launch import config
from manta.trainer.model.build import build_model


def test_numbers_are_read_as_people_write_them(workspace):
    loaded = config.load(workspace.config_file, ["optimizer.learning_rate=1e-4", "optimizer.epsilon=1E-9", "train.steps=1_000"])
    assert loaded.optimizer.learning_rate == 1e-4
    assert loaded.optimizer.epsilon == 1e-9
    assert loaded.train.steps == 1000


def test_sources_are_read_as_people_write_them(workspace):
    for written in ("stdlib:", "[stdlib:]", "['stdlib:']"):
        assert config.load(workspace.config_file, [f"data.sources={written}"]).data.sources[0].path == "stdlib:"


def test_a_config_is_read_back_from_its_own_yaml(workspace, tmp_path):
    loaded = config.load(workspace.config_file)
    file = tmp_path / "config.yaml"
    file.write_text(loaded.to_yaml())
    assert config.load(file) == loaded


def test_text_that_looks_like_a_number_is_read_back_as_text(workspace, tmp_path):
    loaded = config.load(workspace.config_file, ["run.dir='1e3'", "data.sources=[{path: text, name: '1E-4'}]"])
    (tmp_path / "again.yaml").write_text(loaded.to_yaml())
    assert config.load(tmp_path / "again.yaml") == loaded


def test_keys_of_a_config_override_its_preset(workspace):
    loaded = config.load(workspace.config_file, ["model.preset=gpt2-124m", "model.width=96"])
    assert (loaded.model.layers, loaded.model.width, loaded.model.heads) == (2, 96, 12)


PRESETS = {
    "gpt2-tiny": 0.83e6,
    "gpt2-124m": 124.4e6,
    "gpt2-350m": 354.8e6,
    "gpt2-774m": 774.0e6,
    "gpt2-1.5b": 1557.6e6,
    "llama-tiny": 0.804e6,
    "llama-1b": 1038.7e6,
    "llama-8b": 7241.7e6,
    "moe-tiny": 2.57e6,
    "moe-8x": 3123.9e6,
    "bert-tiny": 0.86e6,
    "bert-base": 109.5e6,
    "bert-large": 335.2e6,
}
"""Parameters: gpt2 with a vocabulary of 50257 and 1024 positions, bert with 30522 and 512, the tiny ones with 128 and 128."""


def test_the_table_has_every_preset():
    assert {path.stem for path in config.PRESETS.glob("*.yaml")} == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_has_the_number_of_parameters_in_its_name(workspace, name):
    tree = yaml.safe_load(workspace.config_file.read_text()) | {"model": config.preset(name, "run.yaml")}
    tree["data"]["objective"] = "masked" if name.startswith("bert") else "causal"
    model = config.validate(tree, workspace.config_file, {}).model
    sizes = {"gpt2": (50257, 1024), "bert": (30522, 512)}
    vocabulary, length = (128, 128) if "tiny" in name else sizes.get(model.family, (50257 if "moe" in name else 32000, 1024))
    with torch.device("meta"):
        built = build_model(model, vocabulary=vocabulary, sequence_length=length)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    assert parameters == pytest.approx(PRESETS[name], rel=0.01)


def test_docs_config_md_agrees_with_the_code():
    written = Path(__file__).parents[2] / "docs" / "config.md"
    remedy = "run: .venv/bin/python tests/support/config_reference.py > docs/config.md"
    assert written.read_text().rstrip() == reference().rstrip(), remedy


def test_docs_config_md_has_the_keys_of_nested_sections():
    text = reference()
    for key in (
        "model.experts",
        "model.experts.experts",
        "model.experts.top_k",
        "model.experts.router_z_loss",
        "model.experts.bias_update_speed",
    ):
        assert f"| `{key}` |" in text
    assert "Undefined" not in text
