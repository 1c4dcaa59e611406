"""To Hugging Face's Llama: a directory that AutoModelForCausalLM and AutoTokenizer load with no code of ours."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from manta.data.errors import InputError
from manta.trainer.model.gpt import GPT
from manta.trainer.pretrained import Pretrained

# Ours -> theirs; the rotation pairs the same halves, so that weights go over unchanged.
OUTSIDE = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
INSIDE = {"attention_norm.": "input_layernorm.", "mlp_norm.": "post_attention_layernorm.", "attention.": "self_attn."}


def export(trained: Pretrained, directory: Path, *, dtype: torch.dtype) -> None:
    """Writes config, weights, tokenizer. Raises InputError where anything but an earlier export lies in `directory`."""
    if directory.exists() and (not directory.is_dir() or {entry.name for entry in directory.iterdir()} - FILES):
        raise InputError(f"{directory}: got something that is no export, wants a new or empty directory; choose another with --output")
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {their_name(name): tensor.to(dtype).contiguous() for name, tensor in trained.model.state_dict().items()}
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    end = trained.tokenizer.end_of_text
    token = trained.config.tokenizer.end_of_text
    _write(partial / "config.json", model_config(trained.model, trained.config.data.sequence_length, end, dtype))
    _write(partial / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "do_sample": True})
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token,
        "eos_token": token,
        "model_max_length": trained.config.data.sequence_length,
        "clean_up_tokenization_spaces": False,
    }
    _write(partial / "tokenizer_config.json", tokenizer_config)
    shutil.copyfile(trained.tokenizer_file, partial / "tokenizer.json")
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def their_name(name: str) -> str:
    """layers.0.attention.q_proj.weight -> model.layers.0.self_attn.q_proj.weight."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    for ours, theirs in INSIDE.items():
        name = name.replace(f".{ours}", f".{theirs}")
    return f"model.{name}"


def model_config(model: GPT, sequence_length: int, end: int, dtype: torch.dtype) -> dict[str, object]:
    config = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
