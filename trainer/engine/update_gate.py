"""Skips single updates: weights and optimizer state stay as they are, whatever DeepSpeed does around the optimizer's step.

A torch optimizer does not touch a weight without a gradient. So the gradients are taken away for the step, and given back after it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class UpdateGate:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._is_rejected: Callable[[], bool] = _never
        self._decision: bool | None = None
        self._gradients: list[tuple[Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def start(self, is_rejected: Callable[[], bool]) -> None:
        """Ask `is_rejected` once, when the optimizer is about to step: DeepSpeed knows the gradient norm by then.

        Under ZeRO-3, the optimizer steps once for each of several groups of weights.
        """
        self._is_rejected, self._decision = is_rejected, None

    @property
    def rejected(self) -> bool:
        """Whether the last update was skipped."""
        return bool(self._decision)

    def _before(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        if self._decision is None:
            self._decision = self._is_rejected()
        if self._decision:
            weights = (weight for group in optimizer.param_groups for weight in group["params"])
            self._gradients = [(weight, weight.grad) for weight in weights if weight.grad is not None]
            for weight, _ in self._gradients:
                weight.grad = None

    def _after(self, _optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        for weight, gradient in self._gradients:
            weight.grad = gradient
        self._gradients = []


def _never() -> bool:
    return False
