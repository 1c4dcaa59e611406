"""`manta presets`: the shape of each preset, and how much memory its state takes."""

from typing import Any

import torch
from rich.filesize import decimal
from rich.table import Column

from manta.launch.config import PRESETS, preset
from manta.launch.inspect.charts import console, plain_table
from manta.launch.presets.starter import scale
from manta.trainer.config.model import ModelConfig
from manta.trainer.config.sections import ParallelConfig, TrainConfig
from manta.trainer.dist.layout import largest_layout
from manta.trainer.engine.memory import estimate_memory
from manta.trainer.model.build import build_model

MEMORY = ("weights", "gradients", "optimizer")

Report = list[dict[str, Any]]


def describe_presets() -> Report:
    """Return each preset's shape, parameters, and the memory of its state in the default precision, on one rank."""
    layout = largest_layout(TrainConfig(steps=1, global_batch=1, micro_batch=1), ParallelConfig(), 1)
    report: Report = []
    for name in sorted(path.stem for path in PRESETS.glob("*.yaml")):
        model, sizes = ModelConfig.model_validate(preset(name, name)), scale(name)
        with torch.device("meta"):
            built = build_model(model, vocabulary=sizes.vocabulary, sequence_length=sizes.sequence_length)
        shapes = {key: tuple(parameter.shape) for key, parameter in built.named_parameters()}
        memory = estimate_memory(shapes, layout, "bf16", "adamw")
        report.append(
            {
                "name": name,
                "family": model.family,
                "layers": model.layers,
                "width": model.width,
                "heads": model.heads,
                "experts": model.experts.experts if model.experts else None,
                "vocabulary": sizes.vocabulary,
                "sequence_length": sizes.sequence_length,
                "parameters": sum(parameter.numel() for parameter in built.parameters()),
                "weights_bytes": memory.weights,
                "gradients_bytes": memory.gradients,
                "optimizer_bytes": memory.masters + memory.optimizer,
            }
        )
    return report


def show(report: Report) -> None:
    table = plain_table(Column("preset"), Column("family"), "layers", "width", "heads", "experts", "vocabulary", "parameters", *MEMORY)
    for row in report:
        numbers = (str(row[key] or "") for key in ("layers", "width", "heads", "experts", "vocabulary"))
        parameters = f"{row['parameters'] / 1e6:,.1f} M"
        table.add_row(row["name"], row["family"], *numbers, parameters, *(decimal(row[f"{kind}_bytes"]) for kind in MEMORY))
    console().print(table)
