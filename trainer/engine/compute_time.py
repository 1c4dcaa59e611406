"""The time that a rank spends on its own computation, the measure of straggler detection. Step times cannot show a straggler, since in
collectives every rank waits for the slowest.

Under ZeRO 0 to 2 a forward pass has no collectives, and all of it counts. ZeRO-3 gathers weights in it, and tensor, sequence and expert
parallelism exchange activations: there only linear layers without collectives count. If such blocks are compiled, layers cannot be
timed: the whole forward pass counts, and a group appears as slow as its slowest rank.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from manta.trainer.dist.layout import Layout


class ComputeTimer:
    """Times the forward passes of training. On a GPU it returns times one step late, once they are known, so that nothing waits."""

    def __init__(self, model: nn.Module, layout: Layout, device: torch.device, *, compiled: bool) -> None:
        """Create this after `parallelize`, and after DeepSpeed has added its gathers before the layers."""
        self._on_gpu = device.type == "cuda"
        self._start: Any = None
        self._is_training = False  # False in evaluation, and when the backward pass recomputes activations
        self._spans: list[tuple[Any, Any]] = []
        self._previous: list[tuple[Any, Any]] = []
        is_shared = max(layout.tensor, layout.sequence, layout.expert) > 1
        self._by_layer = layout.zero == 3 or (is_shared and not compiled)
        for module in model.modules() if self._by_layer else ():
            if isinstance(module, nn.Linear) and "forward" not in vars(module):  # a replaced forward has collectives
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave, prepend=True)

    @contextmanager
    def forward(self) -> Generator[None, None, None]:
        """Time a forward pass of training."""
        start = None if self._by_layer else self._now()
        self._is_training = True
        yield
        self._is_training = False
        if start is not None:
            self._spans.append((start, self._now()))

    def take_seconds(self) -> float:
        """Return the seconds since the last call; on a GPU those before the last call."""
        spans, self._spans = self._spans, []
        if not self._on_gpu:
            return sum(end - start for start, end in spans)
        spans, self._previous = self._previous, spans
        return sum(start.elapsed_time(end) for start, end in spans) / 1000

    def _enter(self, *_: object) -> None:
        if self._is_training:
            self._start = self._now()

    def _leave(self, *_: object) -> None:
        if self._is_training:
            self._spans.append((self._start, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
