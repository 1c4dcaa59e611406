"""DeepSpeed, and all that we know of it (with the checkpoint's fragment reader).

Its config dict is built from our typed one alone: it accepts unknown keys without a word.
"""

import importlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else its import tries every vendor's

import deepspeed
import deepspeed.ops

from manta.trainer.config import OptimizerConfig, Precision
from manta.trainer.layout import Layout
from manta.trainer.optim import build_optimizer

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# On CPU it would compile this at the first collective, for half a minute, and training is as fast without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# What initialize and an optimizer's constructor would import: a spare must have it all. Muon's module compiles a function when it is
# imported, which takes a quarter of all start-up, for an optimizer that we do not use.
importlib.import_module("torch._dynamo")
with patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"):
    for name in ("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.zero.stage_1_and_2"):
        importlib.import_module(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """tokens and targets [micro_batch, T]: each target is the token after."""

    tokens: Tensor
    targets: Tensor


class Engine:
    """A model under ZeRO, trained one optimizer step at a time."""

    def __init__(self, model: nn.Module, *, layout: Layout, optimizer: OptimizerConfig, precision: Precision) -> None:
        """model: maps (tokens, targets) to a mean loss, in fp32, its weights the same on every rank."""
        self.layout, self._model = layout, model
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(model, optimizer), config=_settings(layout, optimizer, precision)
        )

    @property
    def module(self) -> nn.Module:
        """The model in training precision."""
        return self._model

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer, which holds this rank's share of masters and state. Untyped: its private parts are read."""
        return self.deepspeed.optimizer

    def step(self, microbatches: Iterable[Microbatch], *, learning_rate: float) -> tuple[Tensor, float]:
        """One optimizer step over `layout.accumulation` micro batches.

        Gives this rank's mean loss (a scalar on its device) and the global gradient norm before clipping.
        """
        for group in self.zero.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.train()
        total = torch.zeros((), device=self.deepspeed.device)
        for batch in microbatches:
            loss = self.deepspeed(batch.tokens, batch.targets)
            self.deepspeed.backward(loss)  # divides by the accumulation
            self.deepspeed.step()  # acts on the last micro batch
            total += loss.detach()
        norm = self.deepspeed.get_global_grad_norm()
        assert norm is not None, "ZeRO keeps the norm of each step"
        return total / self.layout.accumulation, float(norm)

    @torch.no_grad()
    def loss(self, batch: Microbatch) -> Tensor:
        """The mean loss, with nothing learned."""
        self.deepspeed.eval()
        return self.module(batch.tokens, batch.targets)


def _settings(layout: Layout, optimizer: OptimizerConfig, precision: Precision) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": optimizer.gradient_clipping,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW: faster than DeepSpeed's own in every pairing
        "bf16": {"enabled": precision == "bf16"},
    }
