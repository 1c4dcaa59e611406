"""The table of architectures: equal logits in transformers, and a refusal in one line for anything without a counterpart."""

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open
from saved_models import EQUIVALENT, EXPERTS, SIGMOID, exported, logit_difference, model_config, random_run

from manta.data.errors import InputError
from manta.trainer.architectures.architecture import ARCHITECTURES, map_tensors
from manta.trainer.architectures.config_json import architecture_for, from_hf_config
from manta.trainer.config.model import ExpertsConfig, ModelConfig
from manta.trainer.model.build import build_model
from manta.trainer.pretrained.load import model_tensors

UNBIASED = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM"}
REFUSED = [
    ({"logit_soft_cap": 30.0}, "model.logit_soft_cap: expected none, got 30.0. Train a model that LlamaForCausalLM"),
    ({"family": "gpt2", "experts": EXPERTS}, "model.experts: expected none for gpt2 in transformers, got some."),
    ({"experts": {**EXPERTS, "scale": 2.0}}, "model.experts.scale: expected 1.0, got 2.0. Train a model that MixtralForCausalLM"),
    ({"experts": {**EXPERTS, "normalize": False}}, "model.experts.normalize: expected True, got False"),
    ({"experts": {**EXPERTS, "shared": 1}, "qk_norm": True}, "shared: expected 0, got 1. Train a model that Qwen3MoeForCausalLM"),
    ({"experts": {**EXPERTS, "balance": "bias"}}, "model.experts.balance: expected 'loss' or 'none', got 'bias'"),
    ({"experts": {**SIGMOID, "shared": 0}}, "shared: expected at least 1, got 0. Train a model that Glm4MoeForCausalLM"),
    ({"experts": {**SIGMOID, "balance": "loss"}}, "model.experts.balance: expected 'bias', got 'loss'"),
    ({"experts": SIGMOID, "sliding_window": 4}, "model.sliding_window: expected none, got 4"),
    ({"family": "mine.model:Mine"}, "model.family: expected llama, gpt2 or bert, got 'mine.model:Mine'"),
]


@pytest.mark.parametrize("case", EQUIVALENT)
def test_transformers_computes_the_same_logits(case, tmp_path):
    changes, name = EQUIVALENT[case]
    run_directory = random_run(tmp_path, **changes)
    directory = exported(run_directory)
    assert json.loads((directory / "config.json").read_text())["architectures"] == [name]
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert any("bias" in key for key in file.keys()) == (name not in UNBIASED)  # noqa: SIM118
    difference = logit_difference(run_directory, directory)
    print(f"{case} ({name}): {difference:.1e}")  # noqa: T201
    assert difference <= 1e-5


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_config_without_counterpart_is_refused_by_key(changes, message):
    with pytest.raises(InputError) as refused:
        architecture_for(model_config(**changes))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_key_of_a_model_is_mapped_required_or_for_training():
    training = {"preset", "family", "dropout", "attention_dropout", "label_smoothing", "z_loss", "options", "rope_theta", "positions"}
    training |= {"experts.balance_weight", "experts.bias_update_speed", "experts.router_z_loss", "vocabulary", "mlp_width"}
    of_experts = {f"experts.{name}" for name in ExpertsConfig.model_fields}
    for architecture in ARCHITECTURES.values():
        known = architecture.keys.keys() | architecture.requires.keys() | training
        known |= {"sliding_window"} if architecture.has_window_switch else set()
        if architecture.family != "llama":  # the section refuses the keys of other families
            known |= {"kv_heads", "head_width", "qk_norm", "logit_soft_cap", "sliding_window"}
        expected = ModelConfig.model_fields.keys() - {"experts"}
        assert known >= (expected | of_experts if architecture.has_experts else expected), architecture.name


def test_a_tensor_without_a_row_is_an_error():
    model = build_model(model_config(family="gpt2"), vocabulary=9, sequence_length=4)
    tensors = {ours: row for ours, row in ARCHITECTURES["gpt2"].tensors.items() if ours != "norm"}
    without_norm = ARCHITECTURES["gpt2"].model_copy(update={"tensors": tensors})
    with pytest.raises(InputError, match=r"no row for \['norm.bias', 'norm.weight'\]"):
        map_tensors(without_norm, model_config(family="gpt2"), model_tensors(model))


QWEN3 = {"model_type": "qwen3", "vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
WINDOWED = {**QWEN3, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**WINDOWED, "num_hidden_layers": "x"}, "num_hidden_layers: expected a whole number, got 'x'"),
        ({**WINDOWED, "num_hidden_layers": True}, "num_hidden_layers: expected a whole number, got True"),
        ({**WINDOWED, "max_window_layers": None}, "max_window_layers: expected a whole number, got None"),
        ({**WINDOWED, "layer_types": 3}, "layer_types: expected the same window in every layer, or in none, got 3"),
        ({**WINDOWED, "max_window_layers": 1}, "max_window_layers: expected 0 or 2, the same window in every layer or in none, got 1"),
        ({**WINDOWED, "layer_types": ["sliding_attention"]}, 'the same window in every layer, or in none, got ["sliding_attention"]'),
        ({**WINDOWED, "layer_types": ["full_attention", {}]}, 'the same window in every layer, or in none, got ["full_attention", {}]'),
        ({**WINDOWED, "num_hidden_layers": 0}, "num_hidden_layers: expected greater than or equal to 1, got 0"),
        ({"model_type": "gpt2", "embd_pdrop": 0.2}, "embd_pdrop: expected resid_pdrop's 0.1, got 0.2"),
        ({"model_type": "gpt2", "resid_pdrop": 0.0}, "embd_pdrop: expected resid_pdrop's 0.0, got 0.1"),
    ],
)
def test_an_unsupported_config_json_is_refused_in_one_line(config, message):
    with pytest.raises(InputError) as refused:
        from_hf_config(config, Path("config.json"))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_window_of_a_config_json_depends_on_its_layers():
    assert from_hf_config(WINDOWED, Path("config.json"))[1].sliding_window == 8
    for unused in ({"max_window_layers": 2}, {"layer_types": ["full_attention"] * 2}):
        assert from_hf_config({**WINDOWED, **unused}, Path("config.json"))[1].sliding_window is None


def test_the_documentation_lists_what_can_be_imported():
    models = (Path(__file__).parents[2] / "docs/models.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+For\w+`|`GPT2LMHeadModel`)(?:, `\w+`)*) \|$", models, re.MULTILINE)
    of_code = {each.model_type: {each.name, each.subset} - {None} for each in ARCHITECTURES.values()}
    assert {model_type: set(re.findall(r"\w+", classes)) for model_type, classes in rows} == of_code
