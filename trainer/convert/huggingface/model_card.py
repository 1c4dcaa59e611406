"""The model card: what was trained, on what, and how far."""

from importlib.metadata import PackageNotFoundError, version

import torch

from manta.trainer.convert.huggingface.directory import mark
from manta.trainer.metrics import read_metrics
from manta.trainer.pretrained.load import Pretrained


def card(trained: Pretrained, architecture: str, dtype: torch.dtype) -> str:
    """README.md, in Markdown."""
    auto = "AutoModelForPreTraining" if architecture == "BertForPreTraining" else "AutoModelForCausalLM"
    rows = {
        "architecture": architecture,
        "parameters": f"{sum(p.numel() for p in _real(trained)):,}",
        "weights": str(dtype).removeprefix("torch."),
        **(_imported(trained) if trained.source else _figures(trained)),
        "manta": _version(),
    }
    name = trained.home.path.name
    lines = ["---", "library_name: transformers", "---", f"# {name}", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in rows.items()]
    lines += ["", "```python", f"from transformers import {auto}, AutoTokenizer", ""]
    lines += [f'model = {auto}.from_pretrained("path/of/this/directory")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("path/of/this/directory")', "```", "", mark(trained.home), ""]
    return "\n".join(lines)


def _figures(trained: Pretrained) -> dict[str, str]:
    """Of the step that is exported, which a run may have gone past."""
    run, step = trained.home.config(), trained.checkpoint.progress.step
    last_phase = run.timeline().stage(max(0, step - 1))
    sequences = last_phase.global_batch * (run.data.sequence_length // last_phase.sequence_length)
    lines = [line for line in read_metrics(trained.home.metrics_file) if line["step"] <= step]
    last = {key: line[key] for line in lines for key in ("train/loss", "eval/loss") if key in line}
    rows = {
        "steps": f"{step:,} of {run.train.steps:,}",
        "tokens": f"{trained.checkpoint.progress.samples_consumed * run.data.sequence_length:,}",
        "global batch": f"{sequences:,} sequences of {last_phase.sequence_length:,} tokens",
        "training loss": f"{last['train/loss']:.4f}" if "train/loss" in last else "not logged",
        "validation loss": f"{last['eval/loss']:.4f}" if "eval/loss" in last else "not measured",
        "precision": run.precision,
        "corpus": ", ".join(f"`{source.called}`" for source in run.data.sources),
    }
    return rows | {"begun with manta": str(trained.home.manifest().get("manta", "unknown"))}


def _imported(trained: Pretrained) -> dict[str, str]:
    return {"trained": "elsewhere: imported, and not changed"} if trained.source else {}


def _real(trained: Pretrained) -> list[torch.Tensor]:
    """Parameters without the rows that only pad the vocabulary."""
    rows = {"embedding.weight", "head.weight", "head.bias"}
    return [p[: trained.vocabulary] if name in rows else p for name, p in trained.model.named_parameters()]


def _version() -> str:
    try:
        return version("manta")
    except PackageNotFoundError:
        return "unknown"
