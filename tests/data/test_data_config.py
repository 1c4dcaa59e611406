"""The data and tokenizer sections of a config, and the imports that their validation needs."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from manta.data.config import DataConfig, TokenizerConfig


def test_config_is_read_strictly_from_json():
    data = DataConfig.model_validate_json(
        '{"sources": ["stdlib:"], "sequence_length": 128, "directory": "/x", "validation": 0.02}', strict=True
    )
    assert (data.sources[0].path, data.directory, data.text_field, data.workers) == ("stdlib:", "/x", "text", None)
    assert TokenizerConfig.model_validate_json("{}", strict=True).vocabulary == 4096


@pytest.mark.parametrize("mixture", [{"a": 1.0, "b": 3.0}, {"weights": {"a": 1.0, "b": 3.0}}, [{"weights": {"a": 1.0, "b": 3.0}}]])
def test_a_mixture_of_one_stage_is_written_in_three_ways(mixture):
    (stage,) = DataConfig.model_validate({"sources": ["a", "b"], "sequence_length": 16, "mixture": mixture}).mixture
    assert (stage.from_tokens, dict(stage.weights)) == (0, {"a": 1.0, "b": 3.0})


@pytest.mark.parametrize(
    "wrong",
    [
        {"sources": ()},
        {"sources": ("a", "a")},
        {"sequence_length": 1},
        {"sequence_length": "128"},
        {"validation": 0.5},
        {"validation": float("nan")},
        {"workers": 0},
        {"objective": "seq2seq"},
        {"mask_share": 0.0},
        {"mask_share": 1.0},
        {"objective": "masked", "sequence_length": 4},
        {"surplus": 1},
    ],
)
def test_an_invalid_config_is_refused(wrong):
    with pytest.raises(ValidationError):
        DataConfig.model_validate({"sources": ("stdlib:",), "sequence_length": 16} | wrong, strict=True)


@pytest.mark.parametrize("model", [DataConfig, TokenizerConfig])
def test_each_field_has_a_description(model):
    assert all(field.description and "\n" not in field.description for field in model.model_fields.values())


def test_config_and_samples_need_no_heavy_imports():
    heavy = "torch datasets pandas pyarrow tokenizers tiktoken"
    imports = "import sys, manta.data.config, manta.data.prepare.prepare"
    program = f"{imports}; sys.exit(' '.join(m for m in '{heavy}'.split() if m in sys.modules) or 0)"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
