"""The model card: what was trained, on what, and for how long."""

from importlib.metadata import version
from pathlib import Path

import torch

from manta.trainer.architectures.architecture import VOCABULARY_ROWS
from manta.trainer.convert.huggingface.directory import marker
from manta.trainer.metrics import read_metrics
from manta.trainer.pretrained.load import Pretrained

AUTO = {"BertForPreTraining": "PreTraining", "BertForMaskedLM": "MaskedLM"}


def model_card(pretrained: Pretrained, architecture: str, dtype: torch.dtype) -> str:
    """Return README.md."""
    auto = f"AutoModelFor{AUTO.get(architecture, 'CausalLM')}"
    named = pretrained.model.named_parameters()
    parameters = sum((p[: pretrained.vocabulary] if name in VOCABULARY_ROWS else p).numel() for name, p in named)  # without padding
    rows = {
        "architecture": architecture,
        "parameters": f"{parameters:,}",
        "weights": str(dtype).removeprefix("torch."),
        **({"trained": "elsewhere: imported, and not changed"} if pretrained.source else _training(pretrained)),
        "manta": version("manta"),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    return template.format(name=pretrained.run_directory.path.name, table=table, auto=auto, marker=marker(pretrained.run_directory))


def _training(pretrained: Pretrained) -> dict[str, str]:
    """Return figures of the exported step; the run may have trained beyond it."""
    run_directory, progress = pretrained.run_directory, pretrained.checkpoint.progress
    run, step = run_directory.config(), progress.step
    stage = run.timeline().stage(max(0, step - 1))
    sequences = stage.global_batch * (run.data.sequence_length // stage.sequence_length)
    lines = [line for line in read_metrics(run_directory.metrics_file) if line["step"] <= step]
    last = {key: line[key] for line in lines for key in ("train/loss", "eval/loss") if key in line}
    return {
        "steps": f"{step:,} of {run.train.steps:,}",
        "tokens": f"{progress.samples_consumed * run.data.sequence_length:,}",
        "global batch": f"{sequences:,} sequences of {stage.sequence_length:,} tokens",
        "training loss": f"{last['train/loss']:.4f}" if "train/loss" in last else "not logged",
        "validation loss": f"{last['eval/loss']:.4f}" if "eval/loss" in last else "not measured",
        "precision": run.precision,
        "corpus": ", ".join(f"`{source.resolved_name}`" for source in run.data.sources),
        "started with manta": run_directory.manifest().manta,
    }
