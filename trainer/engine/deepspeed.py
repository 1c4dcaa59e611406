"""DeepSpeed, and all that we know of it (with the checkpoint's fragment reader).

Its config dict is built from our typed one alone: it accepts unknown keys without a word. It is told of the layout by a `Mesh`, and
by marks on the weights: which are cut over tensor ranks, and which are experts that other ranks do not hold.

Private parts relied on: `DeepSpeedEngine._configure_distributed_model`, `_do_sanity_check`, `has_moe_layers`, the expert groups in
`deepspeed.utils.groups`, and the marks that AutoEP and Megatron leave on weights. A contract test names them.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from manta.trainer.hardware.device import device_type

os.environ["DS_ACCELERATOR"] = device_type()  # else its import tries every vendor's

import deepspeed
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups

from manta.trainer.config.training import OptimizerConfig, Precision
from manta.trainer.dataloader.batch import Batch
from manta.trainer.dist import sharding
from manta.trainer.dist.layout import Layout
from manta.trainer.dist.world import Mesh
from manta.trainer.engine.compute_time import Work
from manta.trainer.engine.memory import Memory, estimate
from manta.trainer.engine.replica_check import Replicas
from manta.trainer.model.transformer import Transformer
from manta.trainer.optim.optimizers import build_optimizer
from manta.trainer.parallel.parallelize import Recompute, parallelize

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of what is done here on purpose: another's optimizer under ZeRO
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # old names that DeepSpeed calls in ZeRO-3
# On CPU it would compile this at the first collective, for half a minute, and training is as fast without. Read, and not assigned, it
# would look for a toolkit for each of its operators.
operators: Any = deepspeed.ops
operators.__compatible_ops__ = {"deepspeed_shm_comm": False}
# On CPU it would ask numactl, by a process of its own, at each of ZeRO-3's reductions, how many devices there are.
os.environ.setdefault("LOCAL_SIZE", "1")
# What initialize and an optimizer's constructor would import: a spare must have it all. Muon's module compiles a function when it is
# imported, which takes a quarter of all start-up, for an optimizer that we do not use.
importlib.import_module("torch._dynamo")
with patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"):
    for name in ("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.zero.stage3"):
        importlib.import_module(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one optimizer step came to."""

    terms: Tensor  # [K]: this rank's share of each term of the loss; summed over the replicas they are the step's
    norm: float  # the global gradient norm before clipping
    skipped: bool  # fp16: a gradient overflowed on some rank, nothing was learned, and the loss scale was lowered


class Engine:
    """A model under a layout, trained one optimizer step at a time."""

    def __init__(
        self,
        model: Transformer,
        *,
        mesh: Mesh,
        optimizer: OptimizerConfig,
        precision: Precision,
        recompute: Recompute = "none",
        compile_blocks: bool = False,
    ) -> None:
        """model: in fp32, whole, its weights the same on every rank; what this rank does not hold of it is let go."""
        self.mesh, self.layout, self.module = mesh, mesh.layout, model
        self.precision, self._clipping = precision, optimizer.gradient_clipping
        self._loads: dict[str, Tensor] = {}
        wholes = {name: parameter.shape for name, parameter in model.named_parameters()}
        memory = estimate(wholes, mesh.layout, precision, optimizer.name)
        parallelize(model, mesh, recompute=recompute, compile_blocks=compile_blocks, fp8=precision == "fp8")
        if precision == "bf16-autocast":  # within DeepSpeed's forward: around it, it would be switched off on GPUs, with a warning
            cast: Any = torch.autocast(device_type(), torch.bfloat16)
            model.forward = cast(model.forward)
        _mark(model, mesh)
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        mpu = mesh if mesh.layout.tensor > 1 else None
        settings = _settings(mesh.layout, optimizer, precision, memory)
        groups.mpu = None  # of another engine in this process
        self.deepspeed = _Engine(
            args=None,
            model=model,
            optimizer=build_optimizer(model.parameters(), optimizer),
            mpu=mpu,
            config=settings,
            config_class=DeepSpeedConfig(settings, mpu),
        )
        self.replicas = Replicas(model, mesh)
        self.work = Work(model, mesh.layout, self.device, compiled=compile_blocks)

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer, which holds this rank's share of masters and state. Untyped: its private parts are read."""
        return self.deepspeed.optimizer

    @property
    def device(self) -> torch.device:
        device: Any = self.deepspeed.device
        return torch.device(device)

    def step(self, microbatches: Iterable[Batch], *, learning_rate: float) -> Outcome:
        """One optimizer step over these micro batches."""
        return self.update(self.accumulate(microbatches), learning_rate=learning_rate)

    def accumulate(self, microbatches: Iterable[Batch]) -> Tensor:
        """Gradients of these micro batches, as many on every rank, each the same on all ranks of a tensor or sequence group: gives terms_K.

        DeepSpeed is told which is the last, and that it divides nothing: how many there are may change from step to step.
        """
        batches = list(microbatches)  # all of them first: each is weighed by what the whole step holds
        divisors_K = self._divisors(batches)
        self.deepspeed.train()
        total_K = torch.zeros(len(self.module.terms), device=self.device, dtype=torch.float32)
        for turn, batch in enumerate(batches, start=1):
            self.deepspeed.set_gradient_accumulation_boundary(turn == len(batches))
            part = self._part(batch)
            with self.work.forward():
                terms_K = self.deepspeed(part, divisors_K)
            self.deepspeed.backward(terms_K.sum(), scale_wrt_gas=False)  # ZeRO divides by the replicas
            total_K += terms_K.detach()
            if turn < len(batches):
                self.deepspeed.step()  # which does nothing yet but count
        return total_K

    def update(self, terms_K: Tensor, *, learning_rate: float) -> Outcome:
        """Learns from the gradients that have been accumulated. terms_K: this rank's sums over its micro batches."""
        for group in self.zero.param_groups:
            group["lr"] = learning_rate
        norm = self._clip() if self.layout.zero == 0 else None
        self.deepspeed.step()
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
        skipped = self.precision == "fp16" and bool(self.zero.overflow)
        self._settle(learned=not skipped)
        return Outcome(terms=terms_K / self.layout.replicas, norm=float(norm or 0.0), skipped=skipped)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """This rank's sum of each term, and its share of how much of each the batch holds: both [K].

        All ranks call this together, as often: weights and experts may lie on others.
        """
        self.deepspeed.eval()
        sums_K = self.deepspeed(self._part(batch), torch.ones(len(self.module.terms), device=self.device))
        counts_K = self.module.counts(batch).double() / self.layout.sequence
        return sums_K.double(), counts_K.to(self.device)

    def loss(self, terms: Sequence[float]) -> float:
        """Of the terms, what is told as the loss: all but what only keeps the model in bounds."""
        return sum(term for name, term in zip(self.module.terms, terms, strict=True) if name not in self.module.auxiliary)

    @property
    def loss_scale(self) -> float | None:
        """fp16's dynamic loss scale; None in other precisions."""
        return float(self.zero.loss_scale) if self.precision == "fp16" else None

    @property
    def loads(self) -> dict[str, Tensor]:
        """Of each mixture, by its name: the share of the last step's tokens that each expert took, [E]."""
        return self._loads

    def _divisors(self, batches: list[Batch]) -> Tensor:
        """What each term is divided by, so that after ZeRO's averages it is the mean over all that the step holds."""
        counts_K = torch.stack([self.module.counts(batch) for batch in batches]).sum(dim=0).to(self.device, torch.float64)
        dist.all_reduce(counts_K, group=self.mesh.replicas)
        counts_K /= self.layout.sequence  # ranks that share a sequence have each counted the whole of it
        return (counts_K.clamp(min=1) / self.layout.replicas).float()

    def _part(self, batch: Batch) -> Batch:
        part = batch.shard(self.mesh.sequence_rank, self.layout.sequence)
        return (part.pin_memory() if self.device.type == "cuda" else part).to(self.device)

    def _clip(self) -> float:
        """Without ZeRO, DeepSpeed tells no norm, and clips each rank's experts by their own: here all by the norm of all."""
        gradients = {name: parameter.grad for name, parameter in self.module.named_parameters() if parameter.grad is not None}
        whole, tensor, expert = squares = torch.zeros(3, device=self.device, dtype=torch.float32)  # by who holds the rest
        for name, gradient in gradients.items():
            held = expert if self._is_cut(name, "expert") else tensor if self._is_cut(name, "tensor") else whole
            held += gradient.float().square().sum()
        dist.all_reduce(tensor, group=self.mesh.tensor)
        dist.all_reduce(expert, group=self.mesh.expert)
        norm = squares.sum().sqrt()
        for gradient in gradients.values():
            gradient.mul_((self._clipping / (norm + 1e-6)).clamp(max=1.0))
        return float(norm)

    def _is_cut(self, name: str, over: sharding.Over) -> bool:
        return sharding.is_cut(name, self.mesh.part, over)

    def _settle(self, *, learned: bool) -> None:
        """What mixtures do between steps: their routers learn how evenly they have chosen, over all ranks."""
        routers = dict(self.module.routers())
        if not routers:
            return
        loads = torch.stack([router.load for router in routers.values()]).to(self.device)
        dist.all_reduce(loads, group=self.mesh.replicas)
        for router, load_E in zip(routers.values(), loads, strict=True):
            router.settle(load_E, learned=learned)
        self._loads = dict(zip(routers, loads / loads.sum(dim=1, keepdim=True).clamp(min=1), strict=True))


class _Engine(DeepSpeedEngine):
    """DeepSpeed looks for its own expert layers; ours it is told of."""

    def _configure_distributed_model(self, model: Any) -> None:
        super()._configure_distributed_model(model)
        self.has_moe_layers = any(hasattr(parameter, "group_name") for parameter in model.parameters())

    def _do_sanity_check(self) -> None:
        """It refuses fp16 on processors that have no instructions for it; torch computes it there too, only slowly."""
        with patch.object(get_accelerator(), "is_fp16_supported", return_value=True):
            super()._do_sanity_check()

    def _validate_zero3_moe_compatibility(self) -> None:
        """It refuses expert layers that it does not know; the parity table has ours."""


def _mark(model: Transformer, mesh: Mesh) -> None:
    """Tells ZeRO which weights are cut, and over whom: for reductions, partitions and the norm."""
    name = f"ep_size_{mesh.layout.expert}"
    known: Any = groups
    known._EXPERT_PARALLEL_GROUP = {name: mesh.expert}  # noqa: SLF001
    known._EXPERT_DATA_PARALLEL_GROUP = {name: mesh.expert_replicas}  # noqa: SLF001
    for weight, parameter in model.named_parameters():
        marked: Any = parameter
        if sharding.is_cut(weight, mesh.part, "tensor"):
            marked.tensor_model_parallel = True
        if sharding.is_cut(weight, mesh.part, "expert"):
            marked.allreduce = False
            marked.group_name = marked.ds_zero_partition_group_name = name
            marked.ds_zero_placement_family = "autoep_expert"


def _settings(layout: Layout, optimizer: OptimizerConfig, precision: Precision, memory: Memory) -> dict[str, Any]:
    # What DeepSpeed may take beside the model's state, in numbers of weights: a fiftieth of it. Its defaults are 500 million and more.
    aside = max(2**18, memory.total // 50 // 4)
    zero: dict[str, Any] = {
        "stage": layout.zero,
        "reduce_bucket_size": aside,
        "sub_group_size": aside,  # ZeRO-3: gradients are made fp32 so many at once
        "stage3_model_persistence_threshold": aside,  # all small weights together: so many of them stay whole
    }
    if layout.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device_type() == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": 1,  # nothing that it counts or divides by: each step tells where it ends
        "gradient_clipping": optimizer.gradient_clipping if layout.zero else 0.0,  # without ZeRO we do it
        "zero_optimization": zero,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice a micro batch
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW: faster than DeepSpeed's own in every pairing
        "zero_force_ds_cpu_optimizer": False,  # its own would be compiled first
        "bf16": {"enabled": precision in ("bf16", "fp8")},
        "fp16": {"enabled": precision == "fp16", "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2},
    }
