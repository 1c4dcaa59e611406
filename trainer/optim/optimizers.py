"""The optimizer: fused AdamW, or SGD, with decay on matrices only."""

from collections.abc import Iterable

import torch
from torch import nn

from manta.trainer.config.training import OptimizerConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Groups: matrices, which decay, and the rest, which do not; apart for each expert group that DeepSpeed knows a weight by."""
    groups: dict[tuple[bool, str | None], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            groups.setdefault((parameter.ndim >= 2, getattr(parameter, "group_name", None)), []).append(parameter)
    described = [
        {"params": held, "weight_decay": config.weight_decay if decays else 0.0, **({"moe": True, "name": expert} if expert else {})}
        for (decays, expert), held in groups.items()
    ]
    if config.name == "sgd":
        return torch.optim.SGD(described, lr=config.learning_rate, momentum=config.beta1, fused=True)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(described, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=True)


STATES: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
}
"""What an optimizer keeps for each weight; all of it element-wise, and all of it zero before the first step."""
