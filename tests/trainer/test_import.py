"""Imports from transformers: unchanged bytes after a round trip, one model in memory, and a refusal of anything that does not fit."""

import ctypes
import json
import threading
from pathlib import Path
from typing import Self

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from saved_models import EQUIVALENT, exported, logit_difference, model_config, random_run, stored_tensors, tokenizer_file

from manta.data.errors import InputError
from manta.launch import config as launch_config
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.storage import open_backend
from manta.trainer.convert.huggingface.import_model import STEP_ZERO, import_model
from manta.trainer.pretrained.load import load_pretrained, model_tensors
from manta.trainer.run_directory import RunDirectory


@pytest.mark.parametrize("case", EQUIVALENT)
def test_a_round_trip_changes_no_byte(case, tmp_path):
    source = exported(random_run(tmp_path, **EQUIVALENT[case][0]), dtype=torch.bfloat16)
    import_model(source, tmp_path / "imported")
    back = exported(RunDirectory(tmp_path / "imported"))
    for file in source.iterdir():
        if file.name != "README.md":
            assert (back / file.name).read_bytes() == file.read_bytes(), file.name


def save_with_transformers(name: str, directory: Path, tokenizer: Path, **config) -> None:
    import transformers

    model_class = getattr(transformers, name)
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 300}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    model = model_class(model_class.config_class(**(special | shape | config)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory, max_shard_size="40KB")
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), eos_token="<|endoftext|>").save_pretrained(directory)


TRANSFORMERS = {
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "LlamaForCausalLM": {"num_key_value_heads": 2, "dtype": "bfloat16"},
    "MistralForCausalLM": {"num_key_value_heads": 2, "sliding_window": 9},
    "Glm4MoeForCausalLM": {
        "num_key_value_heads": 2,
        "partial_rotary_factor": 1.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
        "attention_bias": False,
    },
    "Qwen3ForCausalLM": {"num_key_value_heads": 2, "head_dim": 16},
    "MixtralForCausalLM": {"num_key_value_heads": 2, "num_local_experts": 3},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "BertForPreTraining": {},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_model_of_transformers_is_exported_as_it_was_imported(name, tmp_path):
    source = tmp_path / "theirs"
    save_with_transformers(name, source, tokenizer_file(tmp_path), **TRANSFORMERS[name])
    import_model(source, tmp_path / "imported")
    imported = RunDirectory(tmp_path / "imported")
    back = exported(imported)
    assert stored_tensors(back) == stored_tensors(source)
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert logit_difference(imported, source) <= 1e-5
    assert {path.name for path in imported.path.iterdir()} >= {"checkpoints", "model.yaml", "source.json", "tokenizer.json"}


def test_old_names_and_a_copied_head_are_imported(tmp_path):
    run_directory = random_run(tmp_path, family="gpt2")
    source = exported(run_directory)
    weights = load_file(source / "model.safetensors")
    older = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool), "h.1.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}
    older |= masks | {"lm_head.weight": weights["transformer.wte.weight"].clone()}
    save_file(older, source / "model.safetensors")
    import_model(source, tmp_path / "imported")
    assert stored_tensors(exported(RunDirectory(tmp_path / "imported"))) == stored_tensors(exported(run_directory, "again"))
    save_file(older | {"lm_head.weight": torch.zeros_like(older["lm_head.weight"])}, source / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head.weight: expected the values of transformer.wte.weight, got others"):
        import_model(source, tmp_path / "untied")
    save_file(older | {"ln_f.weight": torch.ones(32, dtype=torch.int64)}, source / "model.safetensors")
    with pytest.raises(InputError, match=r"transformer.ln_f.weight: expected F32, BF16, F16, got I64. Convert it first."):
        import_model(source, tmp_path / "whole numbers")


def test_the_position_buffer_of_bert_is_ignored(tmp_path):
    run_directory = random_run(tmp_path, family="bert")
    source = exported(run_directory)
    older = load_file(source / "model.safetensors") | {"bert.embeddings.position_ids": torch.arange(32)[None]}
    save_file(older, source / "model.safetensors")
    import_model(source, tmp_path / "imported")
    assert stored_tensors(exported(RunDirectory(tmp_path / "imported"))) == stored_tensors(exported(run_directory, "again"))


def edit(directory: Path, **changes) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def replace(directory: Path, *removed: str, **added) -> None:
    file = directory / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name not in removed} | added, file)


DAMAGE = {
    "model_type: expected llama, mistral, qwen3, mixtral, qwen3_moe, glm4_moe, gpt2, bert, got 'bloom'": lambda path: edit(
        path, model_type="bloom"
    ),
    "attention_bias: expected false, got true": lambda path: edit(path, attention_bias=True),
    'hidden_act: expected "silu", got "gelu"': lambda path: edit(path, hidden_act="gelu"),
    "rope_scaling: expected no scaling (rope_type default), got {": lambda path: edit(
        path, rope_scaling={"rope_type": "llama3", "factor": 8.0}
    ),
    "rope_parameters: expected no scaling (rope_type default), got {": lambda path: edit(path, rope_parameters={"rope_type": "yarn"}),
    "partial_rotary_factor: expected 1.0, got 0.5": lambda path: edit(path, partial_rotary_factor=0.5),
    "num_hidden_layers: expected a valid integer, got 'two'": lambda path: edit(path, num_hidden_layers="two"),
    "hidden_size: expected a value, got nothing": lambda path: edit(path, hidden_size=None),
    "vocab_size: expected a whole number, got nothing": lambda path: edit(path, vocab_size=None),
    "max_position_embeddings: expected a whole number, got 'far'": lambda path: edit(path, max_position_embeddings="far"),
    "max_position_embeddings: expected a whole number, got True": lambda path: edit(path, max_position_embeddings=True),
    "heads: ": lambda path: edit(path, num_attention_heads=5, num_key_value_heads=5, head_dim=None),
    "model.norm.weight: expected (32,), got nothing": lambda path: replace(path, "model.norm.weight"),
    "score.weight: expected no such tensor in LlamaForCausalLM": lambda path: replace(path, **{"score.weight": torch.ones(2)}),
    "model.norm.weight: expected (32,), got (31,)": lambda path: replace(path, **{"model.norm.weight": torch.ones(31)}),
    "model.norm.weight: expected F32, BF16, F16, got I64": lambda path: replace(path, **{"model.norm.weight": torch.ones(32).long()}),
    "expected at least the 270 tokens of tokenizer.json, got 260": lambda path: edit(path, vocab_size=260),
    "expected tokenizer.json, got no such file. Write it": lambda path: (path / "tokenizer.json").unlink(),
    "pytorch_model.bin, a pickle": lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
    "expected model.safetensors or model.safetensors.index.json": lambda path: (path / "model.safetensors").unlink(),
    "expected complete safetensors": lambda path: (path / "model.safetensors").write_bytes(b"cut off"),
    "config.json: expected JSON, got Expecting value": lambda path: (path / "config.json").write_text("no"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_model_that_does_not_fit_is_refused_and_nothing_written(message, tmp_path):
    source = exported(random_run(tmp_path))
    DAMAGE[message](source)
    with pytest.raises(InputError) as refused:
        import_model(source, tmp_path / "out" / "imported")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "KeyError"), ('{"weight_map": {"a": "../a"}}', "beside it"), ('{"weight_map": {"a": "b"}}', "expected b,")],
)
def test_a_wrong_index_is_refused(content, message, tmp_path):
    source = exported(random_run(tmp_path))
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=message):
        import_model(source, tmp_path / "imported")


def test_an_import_overwrites_nothing(tmp_path):
    source = exported(random_run(tmp_path))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="expected a new or empty directory"):
        import_model(source, tmp_path / "thesis")


def test_a_checkpoint_of_another_model_is_not_called_damaged(tmp_path):
    run_directory = random_run(tmp_path)
    run_directory.config_file.write_text(run_directory.config_file.read_text().replace("mlp_width: 48", "mlp_width: 40"))
    with pytest.raises(CheckpointError, match=r"blocks.0.mlp.down_proj.weight: expected \(32, 40\), got \(32, 48\)"):
        load_pretrained(run_directory)


def test_an_imported_model_is_a_preset_and_a_checkpoint_at_step_zero(tmp_path, monkeypatch):
    import_model(exported(random_run(tmp_path, family="gpt2", positions=40)), tmp_path / "imported" / "gpt2")
    file = tmp_path / "run.yaml"
    sections = {
        "run": {"dir": "r"},
        "data": {"sources": ["a"], "sequence_length": 16},
        "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
    }
    file.write_text(yaml.safe_dump(sections | {"model": {"preset": "imported/gpt2/model.yaml", "dropout": 0.1}}))
    monkeypatch.chdir(tmp_path)
    loaded = launch_config.load(file)
    assert (
        loaded.model.model_dump()
        == model_config(preset="imported/gpt2/model.yaml", family="gpt2", positions=40, vocabulary=270, dropout=0.1).model_dump()
    )
    assert catalog.newest_valid(open_backend(tmp_path / "imported/gpt2/checkpoints")).progress == STEP_ZERO
    file.write_text(loaded.to_yaml())
    monkeypatch.chdir("/")
    assert launch_config.load(file) == loaded, "a run's config has every key: the preset may be gone"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file"),
        ("run: {dir: x}", "expected the keys of a model section"),
        ("layerz: 3", "mine.yaml: model.layerz: expected a key of model"),
    ],
)
def test_a_wrong_preset_file_is_refused(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / "mine.yaml").write_text(content)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": {"preset": "mine.yaml"}}))
    with pytest.raises(launch_config.ConfigError, match=message):
        launch_config.load(tmp_path / "run.yaml")


def test_a_missing_end_of_text_is_reported_with_the_file_that_names_it(tmp_path):
    source = exported(random_run(tmp_path))
    file = source / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|nowhere|>"}))
    with pytest.raises(InputError, match=r"expected a token '<\|nowhere\|>'.*Set eos_token of tokenizer_config.json"):
        import_model(source, tmp_path / "imported")


class PeakMemory(threading.Thread):
    """The most anonymous memory of this process during a block, in bytes above what it had before."""

    def __enter__(self) -> Self:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before and is used again would hide what is allocated now
        self.ended, self.before = threading.Event(), self.current()
        self.peak = self.before
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.join()
        self.peak -= self.before

    def run(self) -> None:
        while not self.ended.wait(0.001):
            self.peak = max(self.peak, self.current())

    @staticmethod
    def current() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024


def test_export_and_import_hold_a_model_only_once(tmp_path):
    run_directory = random_run(tmp_path, width=512, mlp_width=1536, layers=6)
    size = sum(tensor.nbytes for tensor in model_tensors(load_pretrained(run_directory).model).values())
    assert size > 80e6
    with PeakMemory() as exporting:
        directory = exported(run_directory)
    with PeakMemory() as importing:
        import_model(directory, tmp_path / "imported")
    for memory in (exporting, importing):
        assert 0.7 * size < memory.peak < 1.3 * size  # a layer is 0.16 of it
