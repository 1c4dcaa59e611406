"""Imports from transformers: unchanged bytes after a round trip, one model in memory, and a refusal of anything that does not fit."""

import ctypes
import gc
import json
import os
import threading
from pathlib import Path
from typing import Self

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from saved_models import EQUIVALENT, _batch, exported, logit_difference, model_config, random_run, stored_tensors, tokenizer_file
from spmd import spmd

from manta.data.errors import InputError
from manta.launch import config as launch_config
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.storage import open_backend
from manta.trainer.convert.huggingface.import_model import STEP_ZERO, import_model
from manta.trainer.model.build import build_model
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


def test_bert_without_pooler_is_imported(tmp_path):
    import transformers

    source = tmp_path / "theirs"
    save_with_transformers("BertForMaskedLM", source, tokenizer_file(tmp_path))
    names = stored_tensors(source).keys()
    assert not [name for name in names if "pooler" in name or "seq_relationship" in name]
    import_model(source, tmp_path / "imported")
    imported = RunDirectory(tmp_path / "imported")
    back = exported(imported)
    assert stored_tensors(back) == stored_tensors(source)
    assert (back / "config.json").read_text() == (source / "config.json").read_text()
    assert "AutoModelForMaskedLM" in (back / "README.md").read_text()
    ours = load_pretrained(imported).model
    initial = build_model(ours.config, vocabulary=270, sequence_length=8)
    initial.initialize(0)
    for name in ("pooler.weight", "pooler.bias", "next_sentence.weight", "next_sentence.bias"):
        assert torch.equal(ours.get_parameter(name), initial.get_parameter(name)), name
    tokens = torch.randint(0, 270, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs = transformers.AutoModelForMaskedLM.from_pretrained(source)(tokens).logits
        assert (ours.logits(_batch(tokens, torch.zeros_like(tokens)))[0] - theirs).abs().max() <= 1e-5
    replace(back, **{"bert.pooler.dense.bias": torch.zeros(32)})
    with pytest.raises(InputError, match=r"bert.pooler.dense.weight: expected \(32, 32\), got nothing. Fetch the files of one BertForPre"):
        import_model(back, tmp_path / "half a pooler")


def test_a_model_saved_without_its_head_is_imported(tmp_path):
    run_directory = random_run(tmp_path)
    source = exported(run_directory)
    weights = load_file(source / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in weights.items()}, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    assert config.pop("tie_word_embeddings") is True
    (source / "config.json").write_text(json.dumps(config | {"hidden_act": "swish"}))
    import_model(source, tmp_path / "imported")
    back = exported(RunDirectory(tmp_path / "imported"))
    assert stored_tensors(back) == stored_tensors(exported(run_directory, "again"))
    assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is True
    assert logit_difference(RunDirectory(tmp_path / "imported"), back) <= 1e-5
    save_file(weights | {"norm.weight": weights["model.norm.weight"].clone()}, source / "model.safetensors")
    with pytest.raises(InputError, match=r"model.norm.weight: expected each tensor once, got it twice"):
        import_model(source, tmp_path / "twice")
    edit(source, tie_word_embeddings=False)
    save_file(weights, source / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head.weight: expected \(270, 32\), got nothing"):
        import_model(source, tmp_path / "untied")


def test_other_names_of_an_activation_are_accepted(tmp_path):
    source = exported(random_run(tmp_path, family="gpt2"))
    for name in ("gelu_pytorch_tanh", "gelu_fast"):
        edit(source, activation_function=name)
        import_model(source, tmp_path / name)
        assert logit_difference(RunDirectory(tmp_path / name), source) <= 1e-5
    edit(source, activation_function="gelu")
    with pytest.raises(InputError, match='activation_function: expected "gelu_new", got "gelu"'):
        import_model(source, tmp_path / "exact")


def edit(directory: Path, **changes) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def replace(directory: Path, *removed: str, **added) -> None:
    file = directory / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name not in removed} | added, file)


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


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
    "got No such file or directory. Name the directory of a model, such as hf download writes": lambda path: (
        path / "config.json"
    ).unlink(),
    "pytorch_model.bin, a pickle": lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
    "expected model.safetensors or model.safetensors.index.json": lambda path: (path / "model.safetensors").unlink(),
    "expected complete safetensors": lambda path: (path / "model.safetensors").write_bytes(b"cut off"),
    "config.json: expected JSON, got an invalid file (expected ident at line 1 column 2)": lambda path: (path / "config.json").write_text(
        "no"
    ),
    "num_hidden_layers: expected at most 20, the number of stored tensors, got 1000000": lambda path: edit(path, num_hidden_layers=10**6),
    "num_hidden_layers: expected at most 2147483647, got 1000000000000000000.": lambda path: edit(path, num_hidden_layers=10**18),
    "hidden_size: expected at most 2147483647, got 1000000000000000000.": lambda path: edit(path, hidden_size=10**18),
    "vocab_size: expected a size for the ": lambda path: edit(path, vocab_size=2**24),
    "intermediate_size: expected a size for the ": lambda path: edit(path, intermediate_size=2**24),
    "num_attention_heads: expected a size for the ": lambda path: edit(path, num_attention_heads=2**20, num_key_value_heads=1, head_dim=8),
    "num_attention_heads: expected greater than or equal to 1, got -4": lambda path: edit(path, num_attention_heads=-4),
    "max_position_embeddings: expected 1 to 2147483647, got -1": lambda path: edit(path, max_position_embeddings=-1),
    "(recursion limit exceeded at line 1 column ": lambda path: (path / "config.json").write_text('{"a": ' * 10_000),
    "(number out of range at line 1 column ": lambda path: (path / "config.json").write_text('{"a": ' + "9" * 5000 + "}"),
    "(Out of range float values are not JSON compliant": lambda path: (path / "config.json").write_text('{"a": 1e999}'),
    "(unexpected end of hex escape at line 1 column ": lambda path: (path / "config.json").write_text('{"a": "\\ud800"}'),
    "config.json: expected an object, got list": lambda path: (path / "config.json").write_text("[1]"),
    "model_type: expected llama, mistral, qwen3, mixtral, qwen3_moe, glm4_moe, gpt2, bert, got 'xxxxx": lambda path: edit(
        path, model_type="x" * 200_000
    ),
    "generation_config.json: expected JSON": lambda path: (path / "generation_config.json").write_text("no"),
    "tokenizer_config.json: expected a file of the model, got none": lambda path: replace_by_pipe(path / "tokenizer_config.json"),
    "config.json: expected JSON, got larger than 134,217,728 bytes": lambda path: os.truncate(path / "config.json", 2**28),
    "tokenizer.json: expected a readable tokenizer.json, got an error: larger than": lambda path: os.truncate(
        path / "tokenizer.json", 2**28
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_model_that_does_not_fit_is_refused_and_nothing_written(message, tmp_path):
    source = exported(random_run(tmp_path))
    DAMAGE[message](source)
    with pytest.raises(InputError) as refused:
        import_model(source, tmp_path / "out" / "imported")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 800
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "weight_map: expected tensors and their files, got None"),
        ("{", "index.json: expected JSON, got an invalid file"),
        ('{"weight_map": {"a": ["b"]}}', "beside it"),
        ('{"weight_map": {"a": "../a"}}', "beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "beside it"),
        ('{"weight_map": {"a": "."}}', "beside it"),
        ('{"weight_map": {"a": ".."}}', "outside of the model"),
        ('{"weight_map": {"a": "\\u0000"}}', "got an error: embedded null byte"),
        ('{"weight_map": {"a": "b"}}', "expected b,"),
    ],
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
        gc.collect()  # what is freed meanwhile would hide what is allocated now, as memory that is used again would
        ctypes.CDLL(None).malloc_trim(0)
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


def export_and_import(tmp_path: Path) -> tuple[int, int, int]:
    """Return the size of a model, and the peak memory of its export and of its import."""
    (tmp_path / "small").mkdir()
    import_model(exported(random_run(tmp_path / "small")), tmp_path / "small imported")  # so that all modules are loaded
    run_directory = random_run(tmp_path, width=512, mlp_width=1536, layers=6)
    size = sum(tensor.nbytes for tensor in model_tensors(load_pretrained(run_directory).model).values())
    with PeakMemory() as exporting:
        directory = exported(run_directory)
    with PeakMemory() as importing:
        import_model(directory, tmp_path / "imported")
    return size, exporting.peak, importing.peak


def test_export_and_import_hold_a_model_only_once(tmp_path):
    size, *peaks = spmd(export_and_import, 1, tmp_path)[0]  # in a new process: in this one, memory that other tests freed is used again
    assert size > 80e6
    for peak in peaks:
        assert 0.7 * size < peak < 1.3 * size  # a layer is 0.16 of it


def outside(file: Path, directory: Path) -> None:
    """Move a file out of its model, to `directory`, and link to it."""
    directory.mkdir(exist_ok=True)
    file.rename(directory / file.name)
    file.symlink_to(directory / file.name)


FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_no_file_from_outside_is_imported(name, tmp_path):
    source = exported(random_run(tmp_path))
    outside(source / name, tmp_path / "private")
    with pytest.raises(InputError, match=rf"{name}: expected a file of the model, got a link to .*private/{name}, outside of the model"):
        import_model(source, tmp_path / "imported")
    for target in ("nowhere", name):
        (source / name).unlink()
        (source / name).symlink_to(target)
        with pytest.raises(InputError, match=rf"{name}: expected a file of the model, got (a link to nothing|an error: .*loop)"):
            import_model(source, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_no_file_from_outside_of_an_import_is_exported(name, tmp_path):
    import_model(exported(random_run(tmp_path)), tmp_path / "imported")
    outside(tmp_path / "imported" / name, tmp_path / "private")
    with pytest.raises(InputError, match=rf"{name}: expected a file of the model, got a link to .*outside of the model"):
        exported(RunDirectory(tmp_path / "imported"))
    assert not (tmp_path / "imported/export").exists()


def test_a_repository_of_the_cache_of_hugging_face_is_imported(tmp_path):
    source = exported(random_run(tmp_path), shard_size=20_000)
    snapshot, blobs = (tmp_path / "hub/models--one--two" / name for name in ("snapshots/0a1b", "blobs"))
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "link").symlink_to(snapshot)
    for directory in (snapshot, tmp_path / "link"):
        import_model(directory, tmp_path / f"imported {directory.name}")
    exported(RunDirectory(tmp_path / "imported link"))


def test_an_import_writes_through_no_link_but_the_output_itself(tmp_path):
    source = exported(random_run(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "output").symlink_to("elsewhere")
    import_model(source, tmp_path / "output")
    assert (tmp_path / "output").is_symlink()
    back = exported(RunDirectory(tmp_path / "output"), "../back")
    precious = tmp_path / "precious.txt"
    precious.write_text("years of work")
    for name in ("README.md", "model.safetensors"):
        card = (back / "README.md").read_text()
        (back / name).unlink()
        if name == "README.md":
            (back / name).write_text(card)
        else:
            (back / name).symlink_to(precious)
    exported(RunDirectory(tmp_path / "output"), "../back")
    assert precious.read_text() == "years of work"
    assert not (back / "model.safetensors").is_symlink()
