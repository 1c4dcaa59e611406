"""The optimizer: fused AdamW or SGD, with weight decay on matrices only.

To add one, extend this file, OptimizerConfig.name (config/sections.py), MOMENTS (engine/memory.py) and OPTIMIZERS
(convert/deepspeed/rename.py).
"""

from collections.abc import Iterable

import torch
from torch import nn

from manta.trainer.config.sections import OptimizerConfig

STATE_KEYS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
}
"""An optimizer's state for each weight. All of it is element-wise, and zero before the first step."""


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build it with parameter groups: matrices decay, other weights do not. DeepSpeed needs separate groups for each expert group."""
    groups: dict[tuple[bool, str | None], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            groups.setdefault((parameter.ndim >= 2, getattr(parameter, "group_name", None)), []).append(parameter)
    described = [
        {"params": weights, "weight_decay": config.weight_decay if decays else 0.0, **({"moe": True, "name": expert} if expert else {})}
        for (decays, expert), weights in groups.items()
    ]
    if config.name == "sgd":
        return torch.optim.SGD(described, lr=config.learning_rate, momentum=config.beta1, fused=True)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(described, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=True)
