"""Exports to transformers: the files of a directory, and their bytes."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from saved_models import SIGMOID, exported, logit_difference, random_run, tokenizer_file
from tokenizers import Tokenizer as Reference
from tokenizers import processors

from manta.data.tokenizer import tokenizer


def test_the_auto_classes_load_the_exported_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    directory = exported(random_run(tmp_path))
    assert {entry.name for entry in directory.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    theirs = AutoTokenizer.from_pretrained(directory)
    ids = theirs("one three <|endoftext|>")["input_ids"]
    assert ids[:-1] == tokenizer.Tokenizer(tokenizer_file(tmp_path)).encode(["one three "])[0].tolist()
    assert theirs.eos_token_id == ids[-1]
    assert theirs.decode(ids) == "one three <|endoftext|>"


def test_the_tokenizer_of_bert_adds_special_tokens_to_a_pair(tmp_path):
    from transformers import AutoTokenizer

    directory = exported(random_run(tmp_path, family="bert"))
    theirs = AutoTokenizer.from_pretrained(directory)
    encoded = theirs("one", " two")
    assert theirs.decode(encoded["input_ids"]) == "[CLS]one[SEP] two[SEP]"
    assert set(encoded["token_type_ids"]) == {0, 1}
    assert (theirs.mask_token, theirs.pad_token) == ("[MASK]", "[PAD]")
    assert not (directory / "generation_config.json").exists()


def template(single: str) -> dict:
    special_tokens = [("<|endoftext|>", 0), ("[CLS]", 1)]
    return json.loads(processors.TemplateProcessing(single=single, pair="$A $B:1", special_tokens=special_tokens).__getstate__())


ADDING = {
    "a begin-of-text token": {"post_processor": template("<|endoftext|> $A")},
    "an end-of-text token": {"post_processor": template("$A <|endoftext|>")},
    "a step of several": {
        "post_processor": {
            "type": "Sequence",
            "processors": [
                {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
                template("[CLS] $A <|endoftext|>"),
            ],
        }
    },
    "the tokens of RoBERTa": {
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": ["[SEP]", 2],
            "cls": ["[CLS]", 1],
            "trim_offsets": True,
            "add_prefix_space": True,
        }
    },
    "the tokens of BERT": {"post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]}},
    "padding": {
        "padding": {
            "strategy": {"Fixed": 12},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 4,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        }
    },
    "a truncation": {"truncation": {"direction": "Left", "max_length": 2, "strategy": "LongestFirst", "stride": 0}},
    "a space": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    "nothing": {},
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("adds", ADDING)
def test_the_exported_tokenizer_does_what_training_did(adds, family, tmp_path):
    from transformers import AutoTokenizer

    file = tokenizer_file(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | ADDING[adds]))
    directory = exported(random_run(tmp_path, family=family))
    ours, theirs = tokenizer.Tokenizer(file), AutoTokenizer.from_pretrained(directory)
    special = ours.special_tokens()
    frame = ([special.cls], [special.sep]) if family == "bert" else ([], [])
    texts = ["one two three", " two", "x", "", "three\n\none  two "]
    expected = [[*frame[0], *ids.tolist(), *frame[1]] for ids in ours.encode(texts)]
    assert [theirs(text)["input_ids"] for text in texts] == expected
    assert Reference.from_file(str(directory / "tokenizer.json")).encode(texts[0]).ids == expected[0]
    assert (theirs.padding_side, theirs.truncation_side) == ("right", "right")
    names = {name: getattr(theirs, f"{name}_token_id") for name in ("bos", "eos", "cls", "sep", "mask", "pad")}
    model = json.loads((directory / "config.json").read_text())
    if family == "bert":
        assert names == {"bos": None, "eos": None, "cls": special.cls, "sep": special.sep, "mask": special.mask, "pad": special.pad}
        assert model["pad_token_id"] == special.pad
        assert theirs(texts[:2], padding=True)["input_ids"][1][-1] == special.pad
    else:
        assert names == {"bos": 0, "eos": 0, "cls": None, "sep": None, "mask": None, "pad": None}
        assert (model["bos_token_id"], model["eos_token_id"], model.get("pad_token_id")) == (0, 0, None)


def test_the_exported_tokenizer_pads_as_packing_did(tmp_path):
    from transformers import AutoTokenizer

    run_directory = random_run(tmp_path)
    config = yaml.safe_load(run_directory.config_file.read_text())
    config["data"] |= {"packing": "best_fit", "separate_documents": True}
    run_directory.config_file.write_text(yaml.safe_dump(config))
    theirs = AutoTokenizer.from_pretrained(exported(run_directory))
    assert theirs(["one two three", "x"], padding=True)["input_ids"][1][-1] == theirs.eos_token_id


def test_a_model_card_has_the_figures_of_its_step(tmp_path):
    card = (exported(random_run(tmp_path)) / "README.md").read_text()
    for part in ("LlamaForCausalLM", "| steps | 4 of 5 |", "| tokens | 512 |", "| training loss | 5.0000 |", "`documents/*.txt`", "bf16"):
        assert part in card


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_the_bytes_that_safetensors_writes(tmp_path, dtype):
    directory = exported(random_run(tmp_path, tied_head=False, experts=SIGMOID), dtype=dtype)
    file = directory / "model.safetensors"
    weights = load_file(file)
    assert weights["model.layers.0.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    save_file(weights, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert file.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_large_weights_are_written_in_shards(tmp_path):
    run_directory = random_run(tmp_path)
    weights, directory = load_file(exported(run_directory) / "model.safetensors"), exported(run_directory, "sharded", shard_size=20_000)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert all(path.stat().st_size < 22_000 or len(load_file(path)) == 1 for path in shards)
    assert logit_difference(run_directory, directory) <= 1e-5
    exported(run_directory, "sharded")  # replaces it: no shard remains
    assert not list(directory.glob("model-*"))


def test_a_failed_export_keeps_the_earlier_one(tmp_path, monkeypatch):
    run_directory = random_run(tmp_path)
    directory = exported(run_directory)
    before = (directory / "model.safetensors").read_bytes()
    monkeypatch.setattr("manta.trainer.convert.huggingface.export.model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exported(run_directory)
    assert (directory / "model.safetensors").read_bytes() == before
    assert not list(run_directory.path.glob(".*partial"))
