"""How long does a rank compute by itself? A step's time can not tell: in its collectives every rank waits for the slowest.

Under ZeRO 0 to 2 there are none in a forward pass, and all of it counts. ZeRO-3 gathers weights within it, and ranks that share heads,
sequences or experts exchange what they hold: there the linear layers count, those in which nothing is exchanged. Where such a share is
compiled there is nothing to see between layers: all of the forward pass counts, and a group is as slow as its slowest.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from manta.trainer.dist.layout import Layout


class Work:
    """Seconds of training's forward passes. On a GPU they are told a step later, when they are known: nothing waits for it."""

    def __init__(self, model: nn.Module, layout: Layout, device: torch.device, *, compiled: bool) -> None:
        """Once the model lies as it will, and DeepSpeed has put its gathers before the layers."""
        self._on_gpu = device.type == "cuda"
        self._begun: Any = None
        self._counts = False  # else it is evaluation, or a recomputation on the way back
        self._spans: list[tuple[Any, Any]] = []
        self._earlier: list[tuple[Any, Any]] = []
        shares = max(layout.tensor, layout.sequence, layout.expert) > 1
        self._by_layer = layout.zero == 3 or (shares and not compiled)
        for module in model.modules() if self._by_layer else ():
            if isinstance(module, nn.Linear) and "forward" not in vars(module):  # else a product that ranks share
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave, prepend=True)

    @contextmanager
    def forward(self) -> Generator[None, None, None]:
        """Around a forward pass."""
        begun = None if self._by_layer else self._now()
        self._counts = True
        yield
        self._counts = False
        if begun is not None:
            self._spans.append((begun, self._now()))

    def take(self) -> float:
        """Seconds since it was last asked; on a GPU those before."""
        spans, self._spans = self._spans, []
        if not self._on_gpu:
            return sum(end - begin for begin, end in spans)
        spans, self._earlier = self._earlier, spans
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1000

    def _enter(self, *_: object) -> None:
        if self._counts:
            self._begun = self._now()

    def _leave(self, *_: object) -> None:
        if self._counts:
            self._spans.append((self._begun, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
