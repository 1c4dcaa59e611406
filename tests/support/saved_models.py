"""Runs with random weights, their exports to transformers, and the model classes that compute the same there."""

import json
from pathlib import Path

import torch
import yaml
from runs import METRICS
from safetensors import safe_open

from manta.data.tokenizer import tokenizer
from manta.data.tokenizer.train import train as train_tokenizer
from manta.trainer.checkpoint.manifest import Progress
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.config.model import ModelConfig
from manta.trainer.convert.huggingface.export import export
from manta.trainer.dataloader.batch import IGNORED, Batch
from manta.trainer.model.build import build_model
from manta.trainer.model.decoder import Decoder
from manta.trainer.pretrained.load import load_pretrained, model_tensors
from manta.trainer.run_directory import RunDirectory

SHAPE = {"layers": 2, "width": 32, "heads": 4, "mlp_width": 48}
EXPERTS = {"experts": 4, "top_k": 2, "width": 24}
SIGMOID = {**EXPERTS, "shared": 2, "score": "sigmoid", "balance": "bias", "scale": 2.5}
ODD = {"kv_heads": 2, "head_width": 16, "rope_theta": 3e5, "norm_epsilon": 1e-2, "tied_head": False, "vocabulary": 301}
EQUIVALENT = {  # changes of our config, and the class of transformers that computes the same
    "gpt2": ({"family": "gpt2", "positions": 40}, "GPT2LMHeadModel"),
    "gpt2, untied": ({"family": "gpt2", "tied_head": False, "mlp_width": None}, "GPT2LMHeadModel"),
    "llama": ({"kv_heads": 2}, "LlamaForCausalLM"),
    "llama, untied": ({"tied_head": False, "head_width": 16, "rope_theta": 5e5, "vocabulary": 320}, "LlamaForCausalLM"),
    "heads that do not divide the width": ({"heads": 3, "head_width": 10}, "MistralForCausalLM"),
    "window": ({"sliding_window": 7, "kv_heads": 2}, "MistralForCausalLM"),
    "qk_norm": ({"qk_norm": True, "norm_epsilon": 1e-6}, "Qwen3ForCausalLM"),
    "qk_norm and window": ({"qk_norm": True, "sliding_window": 7, "head_width": 16}, "Qwen3ForCausalLM"),
    "experts": ({"experts": EXPERTS, "kv_heads": 2}, "MixtralForCausalLM"),
    "experts and window": ({"experts": EXPERTS, "sliding_window": 7, "tied_head": False}, "MixtralForCausalLM"),
    "experts and qk_norm": ({"experts": EXPERTS, "qk_norm": True, "kv_heads": 1}, "Qwen3MoeForCausalLM"),
    "experts, scores not normalized": ({"experts": {**EXPERTS, "normalize": False}, "qk_norm": True}, "Qwen3MoeForCausalLM"),
    "experts balanced by a bias": ({"experts": SIGMOID}, "Glm4MoeForCausalLM"),
    "experts balanced by a bias, and qk_norm": ({"experts": {**SIGMOID, "normalize": False}, "qk_norm": True}, "Glm4MoeForCausalLM"),
    # An odd value for every option that has a counterpart: one that is lost shows.
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


def model_config(**changes) -> ModelConfig:
    return ModelConfig.model_validate(SHAPE | changes)


def tokenizer_file(directory: Path) -> Path:
    """A tokenizer with BERT's special tokens."""
    file = directory / "own tokenizer.json"
    if not file.exists():
        texts, special_tokens = ["one two three"] * 9, tokenizer.MASKING_TOKENS
        file.write_text(train_tokenizer(texts, vocabulary=270, end_of_text="<|endoftext|>", special_tokens=special_tokens))
    return file


def random_run(directory: Path, name: str = "run", **changes) -> RunDirectory:
    """A run directory as training leaves it, with random weights in its newest checkpoint."""
    run_directory, file = RunDirectory(directory / name), tokenizer_file(directory)
    run_directory.path.mkdir()
    sections = {
        "run": {"dir": str(run_directory.path)},
        "data": {"sources": ["documents/*.txt"], "sequence_length": 32},
        "tokenizer": {"file": str(file)},
        "model": {**SHAPE, **changes},
        "train": {"steps": 5, "global_batch": 4, "micro_batch": 2},
    }
    sections["data"] |= {"objective": "masked"} if changes.get("family") == "bert" else {}
    run_directory.config_file.write_text(yaml.safe_dump(sections))
    run_directory.manifest_file.write_text(
        json.dumps({"manta": "0.1", "corpus": {"tokenizer": str(file), "corpora": [], "fingerprint": ""}})
    )
    metrics = ({**METRICS, "step": step, "train/loss": 9.0 - step, "eval/loss": 8.0 - step} for step in range(1, 6))
    run_directory.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in metrics))
    model = build_model(model_config(**changes), vocabulary=tokenizer.Tokenizer(file).vocabulary, sequence_length=32)
    torch.manual_seed(1)
    weights = {f"master/{name}": TensorViews.from_whole(tensor.normal_(std=0.2)) for name, tensor in model_tensors(model).items()}
    CheckpointWriter(run_directory.open_checkpoints(), identity={}, attempt=1).save(
        weights, Progress(step=4, samples_consumed=16, optimizer_steps=4)
    )
    return run_directory


def exported(run_directory: RunDirectory, name: str = "export", **options) -> Path:
    directory = run_directory.path / name
    export(load_pretrained(run_directory), directory, **options)
    return directory


def stored_tensors(directory: Path) -> dict[str, tuple]:
    """Dtype and bytes of each tensor in a directory's safetensors."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            of_file = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        tensors |= {name: (tensor.dtype, tensor.view(torch.uint8).tolist()) for name, tensor in of_file.items()}
    return tensors


@torch.no_grad()
def logit_difference(run_directory: RunDirectory, directory: Path) -> float:
    """The largest absolute difference from the logits of transformers."""
    from transformers import AutoModelForCausalLM, AutoModelForPreTraining

    ours = load_pretrained(run_directory)
    tokens = torch.randint(0, ours.tokenizer.vocabulary, (2, 24), generator=torch.Generator().manual_seed(2))
    if isinstance(ours.model, Decoder):
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        assert ours.model.logits(tokens).std() > 0.1
        return float((ours.model.logits(tokens) - theirs(tokens).logits).abs().max())
    segments = (torch.arange(24) > 9).long().expand_as(tokens)
    theirs = AutoModelForPreTraining.from_pretrained(directory, dtype=torch.float32)(tokens, token_type_ids=segments)
    pairs = zip(ours.model.logits(_batch(tokens, segments)), (theirs.prediction_logits, theirs.seq_relationship_logits), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def _batch(tokens: torch.Tensor, segments: torch.Tensor) -> Batch:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    ignored = torch.full_like(tokens, IGNORED)
    return Batch(tokens=tokens, targets=ignored, positions=positions, keys=torch.zeros(len(tokens), dtype=torch.long), segments=segments)
