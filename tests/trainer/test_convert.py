"""To transformers and back: the same numbers there, the same bytes after a round trip, a line for whatever has no counterpart."""

import ctypes
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from manta.data.errors import InputError
from manta.data.tokenizer import tokenizer
from manta.data.tokenizer.train import train as train_tokenizer
from manta.launch import config as launch_config
from manta.launch.cli import app
from manta.trainer.architectures.config_json import from_theirs
from manta.trainer.architectures.families import ARCHITECTURES, GPT2, architecture_for
from manta.trainer.architectures.tensor_map import bind, tensors
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.backend import open_backend
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.manifest import Progress
from manta.trainer.checkpoint.shards import Pieces
from manta.trainer.checkpoint.writer import Saver
from manta.trainer.config.model import ExpertsConfig, ModelConfig
from manta.trainer.convert.huggingface.export import export
from manta.trainer.convert.huggingface.import_model import STEP_ZERO, import_model
from manta.trainer.dataloader.batch import IGNORED, Batch
from manta.trainer.model.build import build
from manta.trainer.model.decoder import Decoder
from manta.trainer.pretrained.load import load_pretrained
from manta.trainer.run_directory import RunDirectory
from manta.trainer.serve.generate import Sampling, generate, write

SHAPE = {"layers": 2, "width": 32, "heads": 4, "mlp_width": 48}
EXPERTS = {"experts": 4, "top_k": 2, "width": 24}
SIGMOID = {**EXPERTS, "shared": 2, "score": "sigmoid", "balance": "bias", "scale": 2.5}
ODD = {"kv_heads": 2, "head_width": 16, "rope_theta": 3e5, "norm_epsilon": 1e-2, "tied_head": False, "vocabulary": 301}
SAME = {  # what transformers computes alike, and as what
    "gpt2": ({"family": "gpt2", "positions": 40}, "GPT2LMHeadModel"),
    "gpt2, untied": ({"family": "gpt2", "tied_head": False, "mlp_width": None}, "GPT2LMHeadModel"),
    "llama": ({"kv_heads": 2}, "LlamaForCausalLM"),
    "llama, untied": ({"tied_head": False, "head_width": 16, "rope_theta": 5e5, "vocabulary": 320}, "LlamaForCausalLM"),
    "heads that do not divide the width": ({"heads": 3, "head_width": 10}, "MistralForCausalLM"),
    "window": ({"sliding_window": 7, "kv_heads": 2}, "MistralForCausalLM"),
    "normalized queries": ({"qk_norm": True, "norm_epsilon": 1e-6}, "Qwen3ForCausalLM"),
    "normalized queries in a window": ({"qk_norm": True, "sliding_window": 7, "head_width": 16}, "Qwen3ForCausalLM"),
    "mixture": ({"experts": EXPERTS, "kv_heads": 2}, "MixtralForCausalLM"),
    "mixture in a window": ({"experts": EXPERTS, "sliding_window": 7, "tied_head": False}, "MixtralForCausalLM"),
    "mixture, normalized queries": ({"experts": EXPERTS, "qk_norm": True, "kv_heads": 1}, "Qwen3MoeForCausalLM"),
    "mixture, scores as they are": ({"experts": {**EXPERTS, "normalize": False}, "qk_norm": True}, "Qwen3MoeForCausalLM"),
    "mixture, balanced by a bias": ({"experts": SIGMOID}, "Glm4MoeForCausalLM"),
    "mixture, bias, normalized queries": ({"experts": {**SIGMOID, "normalize": False}, "qk_norm": True}, "Glm4MoeForCausalLM"),
    # Every option that has a counterpart set to something odd, so that one which is lost shows.
    "all odd, gpt2": ({"family": "gpt2", "norm_epsilon": 1e-2, "positions": 33, "vocabulary": 301, "mlp_width": 40}, "GPT2LMHeadModel"),
    "all odd, mistral": ({**ODD, "sliding_window": 5}, "MistralForCausalLM"),
    "all odd, qwen3": ({**ODD, "sliding_window": 5, "qk_norm": True}, "Qwen3ForCausalLM"),
    "all odd, mixtral": ({**ODD, "sliding_window": 5, "experts": {**EXPERTS, "top_k": 3}}, "MixtralForCausalLM"),
    "all odd, qwen3_moe": (
        {**ODD, "sliding_window": 5, "qk_norm": True, "experts": {**EXPERTS, "top_k": 3, "normalize": False}},
        "Qwen3MoeForCausalLM",
    ),
    "all odd, glm4_moe": ({**ODD, "qk_norm": True, "experts": {**SIGMOID, "shared": 1, "scale": 1.5, "top_k": 3}}, "Glm4MoeForCausalLM"),
    "bert": ({"family": "bert", "norm_epsilon": 1e-12, "positions": 40}, "BertForPreTraining"),
    "bert, untied": ({"family": "bert", "tied_head": False}, "BertForPreTraining"),
}
UNBIASED = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM"}
REFUSED = [
    ({"logit_soft_cap": 30.0}, "model.logit_soft_cap: got 30.0, and LlamaForCausalLM"),
    ({"family": "gpt2", "experts": EXPERTS}, "model.experts: got 'a mixture', and GPT2LMHeadModel"),
    ({"experts": {**EXPERTS, "scale": 2.0}}, "model.experts.scale: got 2.0, and MixtralForCausalLM"),
    ({"experts": {**EXPERTS, "normalize": False}}, "model.experts.normalize: got False"),
    ({"experts": {**EXPERTS, "shared": 1}, "qk_norm": True}, "model.experts.shared: got 1, and Qwen3MoeForCausalLM"),
    ({"experts": {**EXPERTS, "balance": "bias"}}, "model.experts.balance: got 'bias'"),
    ({"experts": {**SIGMOID, "shared": 0}}, "model.experts.shared: got 0, and Glm4MoeForCausalLM"),
    ({"experts": {**SIGMOID, "balance": "loss"}}, "model.experts.balance: got 'loss'"),
    ({"experts": SIGMOID, "sliding_window": 4}, "model.sliding_window: got 4"),
    ({"family": "mine.model:Mine"}, "model.family: got 'mine.model:Mine'"),
]


def model_config(**changes) -> ModelConfig:
    return ModelConfig.model_validate(SHAPE | changes)


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> Path:
    """A tokenizer that has BERT's marks, too."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    file.write_text(
        train_tokenizer(["one two three"] * 9, vocabulary=270, end_of_text="<|endoftext|>", special_tokens=tokenizer.MASKING_TOKENS)
    )
    return file


@pytest.fixture
def run(tmp_path, words):
    """A run directory whose newest checkpoint holds random weights, as training would have left it."""

    def make(name: str = "run", **changes) -> RunDirectory:
        home = RunDirectory(tmp_path / name)
        home.path.mkdir()
        masked = {"objective": "masked"} if changes.get("family") == "bert" else {}
        sections = {
            "run": {"dir": str(home.path)},
            "data": {"sources": ["documents/*.txt"], "sequence_length": 32, **masked},
            "tokenizer": {"file": str(words)},
            "model": {**SHAPE, **changes},
            "train": {"steps": 5, "global_batch": 4, "micro_batch": 2},
        }
        home.config_file.write_text(yaml.safe_dump(sections))
        corpus = {"tokenizer": str(words), "corpora": [], "fingerprint": ""}
        home.manifest_file.write_text(json.dumps({"manta": "0.1", "corpus": corpus}))
        home.metrics_file.write_text("".join(json.dumps({"step": n, "train/loss": 9 - n, "eval/loss": 8 - n}) + "\n" for n in range(1, 6)))
        model = build(model_config(**changes), vocabulary=tokenizer.Tokenizer(words).vocabulary, sequence_length=32)
        torch.manual_seed(1)
        state = {f"master/{name}": tensor.normal_(std=0.2) for name, tensor in tensors(model).items()}
        pieces = {key: Pieces.all_of(tensor) for key, tensor in state.items()}
        Saver(home.checkpoints, identity={}, attempt=1).save(pieces, Progress(step=4, samples_consumed=16, optimizer_steps=4))
        return home

    return make


def exported(home: RunDirectory, name: str = "export", **how) -> Path:
    place = home.path / name
    export(load_pretrained(home), place, **how)
    return place


def batch(tokens: torch.Tensor, segments: torch.Tensor) -> Batch:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    ignored = torch.full_like(tokens, IGNORED)
    return Batch(tokens=tokens, targets=ignored, positions=positions, keys=torch.zeros(len(tokens), dtype=torch.long), segments=segments)


@torch.no_grad()
def difference(home: RunDirectory, place: Path) -> float:
    """The largest by which a logit is another in transformers."""
    from transformers import AutoModelForCausalLM, AutoModelForPreTraining

    ours = load_pretrained(home)
    tokens = torch.randint(0, ours.tokenizer.vocabulary, (2, 24), generator=torch.Generator().manual_seed(2))
    if isinstance(ours.model, Decoder):
        theirs = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        assert ours.model.logits(tokens).std() > 0.1
        return float((ours.model.logits(tokens) - theirs(tokens).logits).abs().max())
    segments = (torch.arange(24) > 9).long().expand_as(tokens)
    told = AutoModelForPreTraining.from_pretrained(place, dtype=torch.float32)(tokens, token_type_ids=segments)
    pairs = zip(ours.model.logits(batch(tokens, segments)), (told.prediction_logits, told.seq_relationship_logits), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("case", SAME)
def test_transformers_computes_the_same_logits(case, run):
    changes, name = SAME[case]
    home = run(**changes)
    place = exported(home)
    assert json.loads((place / "config.json").read_text())["architectures"] == [name]
    with safe_open(place / "model.safetensors", framework="pt") as file:
        assert any("bias" in key for key in file.keys()) == (name not in UNBIASED)  # noqa: SIM118
    found = difference(home, place)
    print(f"{case} ({name}): {found:.1e}")  # noqa: T201
    assert found <= 1e-5


@pytest.mark.parametrize(("changes", "told"), REFUSED)
def test_what_has_no_counterpart_is_refused_by_its_key(changes, told):
    with pytest.raises(InputError) as refused:
        architecture_for(model_config(**changes))
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_key_of_a_model_is_mapped_or_fixed_or_of_training_alone():
    training = {"preset", "family", "dropout", "attention_dropout", "label_smoothing", "z_loss", "options", "rope_theta", "positions"}
    training |= {"experts.balance_weight", "experts.bias_update_speed", "experts.router_z_loss", "vocabulary", "mlp_width"}
    of_mixtures = {f"experts.{name}" for name in ExpertsConfig.model_fields}
    for architecture in ARCHITECTURES.values():
        told = {key.ours for key in architecture.keys} | architecture.needs.keys() | training
        told |= {"sliding_window"} if architecture.model_type.startswith("qwen3") else set()
        if architecture.family != "llama":  # the section refuses the others' keys
            told |= {"kv_heads", "head_width", "qk_norm", "logit_soft_cap", "sliding_window", "experts"}
        wanted = ModelConfig.model_fields.keys() - {"experts"}
        assert told >= (wanted | {"experts"} if "experts" in told else wanted | of_mixtures), architecture.name


def test_every_tensor_of_a_model_has_a_row():
    model = build(model_config(family="gpt2"), vocabulary=9, sequence_length=4)
    with pytest.raises(AssertionError, match=r"no row for \['norm.bias', 'norm.weight'\]"):
        bind([row for row in GPT2.rows if "ln_f" not in row.theirs], tensors(model), layers=2, experts=0)


# The directory


def test_an_export_is_one_that_its_auto_classes_load(run, words):
    from transformers import AutoTokenizer

    place = exported(run())
    assert {entry.name for entry in place.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    theirs = AutoTokenizer.from_pretrained(place)
    ids = theirs("one three <|endoftext|>")["input_ids"]
    assert ids[:-1] == tokenizer.Tokenizer(words).encode(["one three "])[0].tolist()
    assert theirs.eos_token_id == ids[-1]
    assert theirs.decode(ids) == "one three <|endoftext|>"


def test_bert_s_tokenizer_puts_its_marks_around_a_pair(run):
    from transformers import AutoTokenizer

    place = exported(run(family="bert"))
    theirs = AutoTokenizer.from_pretrained(place)
    told = theirs("one", " two")
    assert theirs.decode(told["input_ids"]) == "[CLS]one[SEP] two[SEP]"
    assert set(told["token_type_ids"]) == {0, 1}
    assert (theirs.mask_token, theirs.pad_token) == ("[MASK]", "[PAD]")
    assert not (place / "generation_config.json").exists()


def test_a_model_card_tells_the_figures_of_its_step(run):
    told = (exported(run()) / "README.md").read_text()
    for part in ("LlamaForCausalLM", "| steps | 4 of 5 |", "| tokens | 512 |", "| training loss | 5.0000 |", "`documents/*.txt`", "bf16"):
        assert part in told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_the_bytes_that_safetensors_would_write(run, tmp_path, dtype):
    place = exported(run(tied_head=False, experts=SIGMOID), dtype=dtype)
    file = place / "model.safetensors"
    held = load_file(file)
    assert held["model.layers.0.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    save_file(held, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert file.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_large_weights_are_written_in_shards(run):
    home = run()
    whole, cut = load_file(exported(home) / "model.safetensors"), exported(home, "cut", shard_size=20_000)
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    shards = sorted(cut.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert all(path.stat().st_size < 22_000 or len(load_file(path)) == 1 for path in shards)
    assert difference(home, cut) <= 1e-5
    exported(home, "cut")  # over it: nothing of the shards is left
    assert not list(cut.glob("model-*"))


def test_an_export_that_fails_leaves_what_was_there(run, monkeypatch):
    home = run()
    place = exported(home)
    before = (place / "model.safetensors").read_bytes()
    monkeypatch.setattr("manta.trainer.convert.huggingface.export.card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exported(home)
    assert (place / "model.safetensors").read_bytes() == before
    assert not list(home.path.glob(".*partial"))


# There and back


def bytes_of(place: Path) -> dict[str, tuple]:
    held = {}
    for path in sorted(place.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            held |= {name: (file.get_tensor(name).dtype, file.get_tensor(name).view(torch.uint8).tolist()) for name in file.keys()}  # noqa: SIM118
    return held


@pytest.mark.parametrize("case", SAME)
def test_a_round_trip_changes_no_byte(case, run, tmp_path):
    source = exported(run(**SAME[case][0]), dtype=torch.bfloat16)
    import_model(source, tmp_path / "imported")
    back = exported(RunDirectory(tmp_path / "imported"))
    for file in source.iterdir():
        if file.name != "README.md":
            assert (back / file.name).read_bytes() == file.read_bytes(), file.name


def save_theirs(name: str, place: Path, words: Path, **config) -> None:
    """A model that transformers made, and wrote."""
    import transformers

    kind = getattr(transformers, name)
    torch.manual_seed(3)
    usual = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 300}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = kind(kind.config_class(**(ends | usual | config)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(place, max_shard_size="40KB")
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(words), eos_token="<|endoftext|>").save_pretrained(place)


THEIRS = {
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


@pytest.mark.parametrize("name", THEIRS)
def test_a_model_of_transformers_comes_in_and_goes_out_the_same(name, tmp_path, words):
    source = tmp_path / "theirs"
    save_theirs(name, source, words, **THEIRS[name])
    import_model(source, tmp_path / "imported")
    home = RunDirectory(tmp_path / "imported")
    back = exported(home)
    assert bytes_of(back) == bytes_of(source)
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert difference(home, source) <= 1e-5
    assert {path.name for path in home.path.iterdir()} >= {"checkpoints", "model.yaml", "source.json", "tokenizer.json"}


def test_older_names_and_a_head_that_is_written_out_are_taken(run, tmp_path):
    home = run(family="gpt2")
    source = exported(home)
    held = load_file(source / "model.safetensors")
    older = {name.removeprefix("transformer."): tensor for name, tensor in held.items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool), "h.1.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}
    older |= masks | {"lm_head.weight": held["transformer.wte.weight"].clone()}
    save_file(older, source / "model.safetensors")
    import_model(source, tmp_path / "imported")
    assert bytes_of(exported(RunDirectory(tmp_path / "imported"))) == bytes_of(exported(home, "again"))
    save_file(older | {"lm_head.weight": torch.zeros_like(older["lm_head.weight"])}, source / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head.weight: got other values than transformer.wte.weight"):
        import_model(source, tmp_path / "untied")
    save_file(older | {"ln_f.weight": torch.ones(32, dtype=torch.int64)}, source / "model.safetensors")
    with pytest.raises(InputError, match=r"transformer.ln_f.weight: got I64, wants F32, BF16, F16; convert it first"):
        import_model(source, tmp_path / "whole numbers")


def test_bert_s_numbered_positions_are_no_weights(run, tmp_path):
    home = run(family="bert")
    source = exported(home)
    older = load_file(source / "model.safetensors") | {"bert.embeddings.position_ids": torch.arange(32)[None]}
    save_file(older, source / "model.safetensors")
    import_model(source, tmp_path / "imported")
    assert bytes_of(exported(RunDirectory(tmp_path / "imported"))) == bytes_of(exported(home, "again"))


def edit(place: Path, **changes) -> None:
    file = place / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(place: Path, *names: str, **others) -> None:
    file = place / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name not in names} | others, file)


SPOILT = {
    "model_type: got 'bloom', wants one of llama": lambda place: edit(place, model_type="bloom"),
    "attention_bias: got true, wants false": lambda place: edit(place, attention_bias=True),
    'hidden_act: got "gelu", wants "silu"': lambda place: edit(place, hidden_act="gelu"),
    "rope_scaling: got {": lambda place: edit(place, rope_scaling={"rope_type": "llama3", "factor": 8.0}),
    "rope_parameters: got {": lambda place: edit(place, rope_parameters={"rope_type": "yarn"}),
    "partial_rotary_factor: got 0.5": lambda place: edit(place, partial_rotary_factor=0.5),
    "num_hidden_layers: got 'two'": lambda place: edit(place, num_hidden_layers="two"),
    "hidden_size: got nothing: Field required": lambda place: edit(place, hidden_size=None),
    "vocab_size: got nothing": lambda place: edit(place, vocab_size=None),
    "max_position_embeddings: got 'far', wants a number": lambda place: edit(place, max_position_embeddings="far"),
    "max_position_embeddings: got True, wants a number": lambda place: edit(place, max_position_embeddings=True),
    "heads: got 5": lambda place: edit(place, num_attention_heads=5, num_key_value_heads=5, head_dim=None),
    "model.norm.weight: got nothing, wants [32]": lambda place: without(place, "model.norm.weight"),
    "score.weight: got a tensor that LlamaForCausalLM has not": lambda place: without(place, **{"score.weight": torch.ones(2)}),
    "model.norm.weight: got [31], wants [32]": lambda place: without(place, **{"model.norm.weight": torch.ones(31)}),
    "model.norm.weight: got I64, wants F32": lambda place: without(place, **{"model.norm.weight": torch.ones(32).long()}),
    "wants the 270 that tokenizer.json has ids for": lambda place: edit(place, vocab_size=260),
    "got no tokenizer.json, wants one; write it": lambda place: (place / "tokenizer.json").unlink(),
    "pytorch_model.bin, a pickle": lambda place: (place / "model.safetensors").rename(place / "pytorch_model.bin"),
    "got no model.safetensors nor": lambda place: (place / "model.safetensors").unlink(),
    "wants whole safetensors": lambda place: (place / "model.safetensors").write_bytes(b"cut off"),
    "config.json: Expecting value": lambda place: (place / "config.json").write_text("no"),
}


@pytest.mark.parametrize("told", SPOILT)
def test_what_manta_s_models_lack_is_refused_and_nothing_left_behind(told, run, tmp_path):
    source = exported(run())
    SPOILT[told](source)
    with pytest.raises(InputError) as refused:
        import_model(source, tmp_path / "out" / "imported")
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("content", "told"), [("{}", "KeyError"), ('{"weight_map": {"a": "../a"}}', "beside it"), ('{"weight_map": {"a": "b"}}', "no b")]
)
def test_an_index_that_lies_is_refused(content, told, run, tmp_path):
    source = exported(run())
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=told):
        import_model(source, tmp_path / "imported")


QWEN3 = {"model_type": "qwen3", "vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
WINDOWED = {**QWEN3, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({**WINDOWED, "num_hidden_layers": "x"}, "num_hidden_layers: got 'x', wants a number"),
        ({**WINDOWED, "num_hidden_layers": True}, "num_hidden_layers: got True, wants a number"),
        ({**WINDOWED, "max_window_layers": None}, "max_window_layers: got None, wants a number"),
        ({**WINDOWED, "layer_types": 3}, "layer_types: got 3, wants the same window in every layer"),
        ({**WINDOWED, "max_window_layers": 1}, 'layer_types: got ["full_attention", "sliding_attention"], wants the same'),
        ({**WINDOWED, "num_hidden_layers": 0}, "num_hidden_layers: got 0"),
        ({"model_type": "gpt2", "embd_pdrop": 0.2}, "embd_pdrop: got 0.2, wants resid_pdrop's 0.1"),
        ({"model_type": "gpt2", "resid_pdrop": 0.0}, "embd_pdrop: got 0.1, wants resid_pdrop's 0.0"),
    ],
)
def test_an_odd_config_is_refused_in_one_line(theirs, told):
    with pytest.raises(InputError) as refused:
        from_theirs(theirs, Path("config.json"))
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_window_is_imported_as_its_layers_have_it():
    assert from_theirs(WINDOWED, Path("config.json"))[1].sliding_window == 8
    assert from_theirs({**WINDOWED, "max_window_layers": 2}, Path("config.json"))[1].sliding_window is None


def test_an_import_overwrites_nothing(run, tmp_path):
    source = exported(run())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="already there"):
        import_model(source, tmp_path / "thesis")


def test_a_checkpoint_of_another_model_is_told_from_a_bad_one(run):
    home = run()
    home.config_file.write_text(home.config_file.read_text().replace("mlp_width: 48", "mlp_width: 40"))
    with pytest.raises(CheckpointError, match=r"blocks.0.mlp.down_proj.weight: got \(32, 48\), wants \(32, 40\)"):
        load_pretrained(home)


def test_an_imported_model_is_a_preset_and_a_checkpoint_at_step_zero(run, tmp_path, monkeypatch):
    import_model(exported(run(family="gpt2", positions=40)), tmp_path / "imported" / "gpt2")
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
    assert catalog.newest(open_backend(tmp_path / "imported/gpt2/checkpoints")).progress == STEP_ZERO
    file.write_text(loaded.to_yaml())
    monkeypatch.chdir("/")
    assert launch_config.load(file) == loaded, "a run's own config has every key: the preset may be gone"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "is no file"),
        ("run: {dir: x}", "wants the keys of a model section"),
        ("layerz: 3", "mine.yaml: model.layerz: got an unknown key"),
    ],
)
def test_a_preset_file_that_is_none_is_told(content, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / "mine.yaml").write_text(content)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": {"preset": "mine.yaml"}}))
    with pytest.raises(launch_config.ConfigError, match=told):
        launch_config.load(tmp_path / "run.yaml")


class Peak(threading.Thread):
    """The most memory of our own that the process holds meanwhile, in bytes above what it held before."""

    def __enter__(self) -> Self:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before and is taken again would hide what is taken now
        self.ended, self.before = threading.Event(), self.held()
        self.most = self.before
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.join()
        self.most -= self.before

    def run(self) -> None:
        while not self.ended.wait(0.001):
            self.most = max(self.most, self.held())

    @staticmethod
    def held() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024


def test_neither_way_holds_a_model_twice(run, tmp_path):
    home = run(width=512, mlp_width=1536, layers=6)
    size = sum(tensor.nbytes for tensor in tensors(load_pretrained(home).model).values())
    assert size > 80e6
    with Peak() as out:
        place = exported(home)
    with Peak() as back:
        import_model(place, tmp_path / "imported")
    for peak in (out, back):
        assert 0.7 * size < peak.most < 1.3 * size  # a layer is 0.16 of it


# Text


@pytest.mark.parametrize("case", ["gpt2", "llama", "window", "mixture", "mixture, balanced by a bias"])
def test_a_cache_writes_what_would_be_written_without(case, run):
    model = load_pretrained(run(**SAME[case][0])).model
    tokens = list(generate(model, [5, 17, 99], count=16, vocabulary=270, end=-1, sampling=Sampling(temperature=0)))
    slowly = [5, 17, 99]
    for _ in range(16):
        slowly.append(int(model.logits(torch.tensor([slowly]))[0, -1, :270].argmax()))
    assert tokens == slowly[3:]


def test_text_goes_on_where_learned_positions_end(run):
    model = load_pretrained(run(family="gpt2", positions=32)).model
    sampling = Sampling(temperature=0)
    tokens = [1, *generate(model, [1], count=40, vocabulary=270, end=-1, sampling=sampling)]
    assert len(tokens) == 41
    again = generate(model, tokens[17:33], count=1, vocabulary=270, end=-1, sampling=sampling)
    assert tokens[33] == next(again), "the last half is read anew"
    assert len(list(generate(model, [1] * 100, count=2, vocabulary=270, end=-1, sampling=sampling))) == 2


def test_bert_writes_no_text(run):
    with pytest.raises(InputError, match="wants a decoder, llama or gpt2"):
        next(write(run(family="bert"), "one", count=1, sampling=Sampling()))


# Commands


def command(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_the_commands_from_a_run_to_an_imported_model_and_back(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("mine", family="gpt2")
    told = command("export", "mine", "--output", "hf", "--dtype", "bfloat16", "--shard-size", "0.02MB")
    assert told.exit_code == 0, told.output
    told = command("import", "hf")
    assert (told.exit_code, told.output.strip()) == (0, "imported/hf")
    told = command("export", "imported/hf", "--shard-size", "0.02MB")
    assert told.exit_code == 0, told.output
    back = Path(told.output.strip())
    assert bytes_of(back) == bytes_of(tmp_path / "hf")
    assert command("export", "mine").exit_code == 0
    assert command("import", "mine/export/hf").output.strip() == "imported/mine"
    texts = [command("generate", home, "one", "--tokens", "8", "--seed", "2") for home in ("imported/hf", "imported/hf")]
    assert [text.exit_code for text in texts] == [0, 0]
    assert texts[0].output == texts[1].output
    assert texts[0].output.startswith("one")
    for wrong in (["--shard-size", "many"], ["--shard-size", "0GB"], ["--dtype", "int8"]):
        refused = command("export", "mine", *wrong)
        assert isinstance(refused.exception, InputError), wrong


@pytest.mark.parametrize("wrong", [["import", "{home}"], ["import", "nowhere"], ["export", "{home}", "--output", "taken"]])
def test_what_an_import_or_export_lacks_is_told_without_torch(wrong, run, tmp_path, monkeypatch):
    home = run()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.tex").touch()
    script = """
import sys
from manta.data.errors import InputError
from manta.launch.cli import app
try:
    app(sys.argv[1:], standalone_mode=False)
except InputError as error:
    print(error)
sys.exit("torch" in sys.modules)
"""
    arguments = [word.format(home=home.path) for word in wrong]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    assert "wants" in done.stdout


def test_a_place_that_can_not_be_made_is_told(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = exported(run("mine"))
    (tmp_path / "file").touch()
    for words in (["export", "mine", "--output", "file/below"], ["import", str(source), "--output", "file/below"]):
        refused = command(*words)
        assert isinstance(refused.exception, InputError), refused.output
        assert "Not a directory), wants a directory that can be written" in str(refused.exception)


def test_an_end_of_text_that_the_tokenizer_lacks_is_told_by_the_file_that_names_it(run, tmp_path):
    source = exported(run())
    file = source / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|nowhere|>"}))
    with pytest.raises(InputError, match=r"expected a token '<\|nowhere\|>'.*Set eos_token of tokenizer_config.json"):
        import_model(source, tmp_path / "imported")


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    manta = Path(sys.executable).with_name("manta")
    done = subprocess.run([manta, "import", "nowhere"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nowhere/config.json" in done.stderr
    assert not list(tmp_path.iterdir())
