"""Train a model under a layout with DeepSpeed, one optimizer step at a time."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from manta.trainer.config.sections import OptimizerConfig, Precision
from manta.trainer.dataloader.batch import Batch
from manta.trainer.dist.layout import Layout
from manta.trainer.dist.world import Mesh
from manta.trainer.engine.compute_time import ComputeTimer
from manta.trainer.engine.deepspeed_private import build_deepspeed, global_grad_norm, mark_sharded
from manta.trainer.engine.memory import MemoryEstimate, estimate_memory
from manta.trainer.engine.replica_check import ReplicaCheck
from manta.trainer.engine.token_sums import TokenSums
from manta.trainer.engine.update_gate import UpdateGate
from manta.trainer.hardware import device_type
from manta.trainer.model.transformer import Transformer
from manta.trainer.optim.optimizers import build_optimizer
from manta.trainer.parallel.parallelize import ActivationCheckpointing, parallelize
from manta.trainer.parallel.sharding import is_sharded


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    terms: Tensor  # [K]: this rank's share of each loss term; their sum over the replicas is the step's
    grad_norm: float  # global, before clipping; not finite if a gradient is not
    skipped: bool  # fp16: a gradient overflowed on some rank, so the weights did not change and the loss scale was lowered
    rejected: bool  # as the caller decided, or because a gradient is not finite, so the weights did not change
    exhausted: bool  # fp16: skipped, and the loss scale is already the smallest


def _none(_grad_norm: float) -> bool:
    """Skip no update."""
    return False


class Engine:
    """A model under a layout, trained one optimizer step at a time."""

    def __init__(
        self,
        model: Transformer,
        *,
        mesh: Mesh,
        optimizer: OptimizerConfig,
        precision: Precision,
        checkpointing: ActivationCheckpointing = "none",
        compile_blocks: bool = False,
    ) -> None:
        """model: whole, in fp32, with the same weights on every rank. Other ranks' shards of it are freed."""
        self.mesh, self.layout, self.module = mesh, mesh.layout, model
        self.precision, self._max_grad_norm = precision, optimizer.gradient_clipping
        self.expert_loads: dict[str, Tensor] = {}
        """By router: each expert's share of the last step's tokens, [E]."""
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        memory = estimate_memory(shapes, mesh.layout, precision, optimizer.name)
        parallelize(model, mesh, checkpointing=checkpointing, compile_blocks=compile_blocks, fp8=precision == "fp8")
        if precision == "bf16-autocast":  # inside DeepSpeed's forward, which disables autocast around it on GPUs, with a warning
            autocast: Any = torch.autocast(device_type(), torch.bfloat16)
            model.forward = autocast(model.forward)
        mark_sharded(model, mesh)
        config = deepspeed_config(mesh.layout, optimizer, precision, memory)
        self.deepspeed = build_deepspeed(model, mesh, build_optimizer(model.parameters(), optimizer), config)
        if precision == "fp16":
            self.zero_optimizer.loss_scaler.raise_error_at_min_scale = False  # the training loop does, and names the step
        is_wrapped = not isinstance(self.zero_optimizer, torch.optim.Optimizer)
        self._gate = UpdateGate(self.zero_optimizer.optimizer if is_wrapped else self.zero_optimizer)
        self.replica_check = ReplicaCheck(model, mesh)
        self.compute_timer = ComputeTimer(model, mesh.layout, self.device, compiled=compile_blocks)

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's optimizer, with this rank's share of masters and state. Untyped, since checkpoints read its private parts."""
        return self.deepspeed.optimizer

    @property
    def device(self) -> torch.device:
        device: Any = self.deepspeed.device
        return torch.device(device)

    def step(self, micro_batches: Iterable[Batch], *, learning_rate: float) -> UpdateResult:
        """Run one optimizer step over these micro batches."""
        return self.update(self.accumulate(micro_batches), learning_rate=learning_rate)

    def accumulate(self, micro_batches: Iterable[Batch], sums: TokenSums | None = None) -> Tensor:
        """Accumulate the gradients of these micro batches. Return this rank's share of each loss term, terms_K.

        Every rank passes the same number of them; ranks of a tensor or sequence group pass the same ones. Since the number may change
        from step to step, DeepSpeed does not divide the loss, and the last one is marked for it. sums: the targets are added to it.
        """
        batches = list(micro_batches)  # all of them first: divisors are counted over the whole step
        divisors_K = self._divisors(batches)
        self.deepspeed.train()
        total_K = torch.zeros(len(self.module.terms), device=self.device, dtype=torch.float32)
        for number, batch in enumerate(batches, start=1):
            self.deepspeed.set_gradient_accumulation_boundary(number == len(batches))
            local = self._local(batch)
            with self.compute_timer.forward(), sums.measure(self.module, local) if sums else nullcontext():
                terms_K = self.deepspeed(local, divisors_K)
            trained = [term for name, term in zip(self.module.terms, terms_K, strict=True) if name not in self.module.metrics]
            self.deepspeed.backward(torch.stack(trained).sum(), scale_wrt_gas=False)  # ZeRO divides by the number of replicas
            total_K += terms_K.detach()
            if number < len(batches):
                self.deepspeed.step()  # only counts before the last micro batch
        return total_K / self.layout.replicas

    def update(self, terms_K: Tensor, *, learning_rate: float, rejects: Callable[[float], bool] = _none) -> UpdateResult:
        """Update the weights with the accumulated gradients. terms_K: what `accumulate` returned.

        rejects: whether to skip the update, given the gradient norm; all ranks decide the same.
        """
        for group in self.zero_optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._clip_gradients() if self.layout.zero == 0 else None
        is_smallest = self._has_smallest_scale()
        self._gate.start(lambda: rejects(global_grad_norm(self.zero_optimizer) if norm is None else norm))
        self.deepspeed.step()
        if norm is None:
            norm = global_grad_norm(self.zero_optimizer)
        overflows = self.layout.zero > 0 and bool(self.zero_optimizer.overflow)  # DeepSpeed did not call the optimizer
        skipped = overflows and self.precision == "fp16"
        rejected = self._gate.rejected or (overflows and not skipped)
        self._update_routers(skipped=skipped or rejected)
        return UpdateResult(terms=terms_K, grad_norm=norm, skipped=skipped, exhausted=skipped and is_smallest, rejected=rejected)

    @torch.no_grad()
    def evaluate(self, batch: Batch, sums: TokenSums | None = None) -> tuple[Tensor, Tensor]:
        """Return this rank's sum of each loss term, and its share of the number of items behind each: both [K].

        All ranks must call this equally often: other ranks may hold weights and experts that it needs. sums: the targets are added to it.
        """
        self.deepspeed.eval()
        local = self._local(batch)
        with sums.measure(self.module, local) if sums else nullcontext():
            sums_K = self.deepspeed(local, torch.ones(len(self.module.terms), device=self.device))
        counts_K = self.module.counts(batch).double() / self.layout.sequence
        return sums_K.double(), counts_K.to(self.device)

    def loss(self, terms: Sequence[float]) -> float:
        """Return the loss to report: the sum of all terms that are neither auxiliary nor metrics."""
        excluded = self.module.auxiliary | self.module.metrics
        return sum(term for name, term in zip(self.module.terms, terms, strict=True) if name not in excluded)

    def named_terms(self, terms: Sequence[float], *, exclude: frozenset[str] = frozenset()) -> dict[str, float]:
        """Return a loss of several terms term by term; nothing if it has only one."""
        names = self.module.terms
        named = dict(zip(names, terms, strict=True)) if len(names) > 1 else {}
        return {name: term for name, term in named.items() if name not in {"loss"} | exclude}

    @property
    def loss_scale(self) -> float | None:
        """fp16's dynamic loss scale; None in other precisions."""
        return float(self.zero_optimizer.loss_scale) if self.precision == "fp16" else None

    def _has_smallest_scale(self) -> bool:
        """Return whether fp16's loss scale cannot be lowered any more. DeepSpeed tolerates some overflows before it lowers it."""
        if self.precision != "fp16":
            return False
        scaler = self.zero_optimizer.loss_scaler
        return scaler.cur_scale <= scaler.min_scale and scaler.cur_hysteresis == 1

    def _divisors(self, batches: list[Batch]) -> Tensor:
        """Return each term's divisor, such that the term is a mean over the whole step once ZeRO has averaged over replicas."""
        counts_K = torch.stack([self.module.counts(batch) for batch in batches]).sum(dim=0).to(self.device, torch.float64)
        dist.all_reduce(counts_K, group=self.mesh.replicas)
        counts_K /= self.layout.sequence  # every rank of a sequence group has counted the whole sequence
        return (counts_K.clamp(min=1) / self.layout.replicas).float()

    def _local(self, batch: Batch) -> Batch:
        """Return this rank's shard of the sequences, on its device."""
        shard = batch.shard(self.mesh.sequence_rank, self.layout.sequence)
        return (shard.pin_memory() if self.device.type == "cuda" else shard).to(self.device)

    def _clip_gradients(self) -> float:
        """Clip by the norm of all gradients and return it. Without ZeRO, DeepSpeed clips each rank's experts by their own norm."""
        gradients = {name: parameter.grad for name, parameter in self.module.named_parameters() if parameter.grad is not None}
        replicated, tensor, expert = squares = torch.zeros(3, device=self.device, dtype=torch.float32)  # sums by how weights are sharded
        for name, gradient in gradients.items():
            is_expert, is_tensor = (is_sharded(name, self.mesh.shard, axis) for axis in ("expert", "tensor"))
            total = expert if is_expert else tensor if is_tensor else replicated
            total += gradient.float().square().sum()
        dist.all_reduce(tensor, group=self.mesh.tensor)
        dist.all_reduce(expert, group=self.mesh.expert)
        norm = squares.sum().sqrt()
        for gradient in gradients.values():
            gradient.mul_((self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return float(norm)

    def _update_routers(self, *, skipped: bool) -> None:
        """Sum the experts' loads over all ranks, and update the routers' biases with them."""
        routers = dict(self.module.routers())
        if not routers:
            return
        loads = torch.stack([router.load for router in routers.values()]).to(self.device)
        dist.all_reduce(loads, group=self.mesh.replicas)
        for router, load_E in zip(routers.values(), loads, strict=True):
            router.end_step(load_E, skipped=skipped)
        self.expert_loads = dict(zip(routers, loads / loads.sum(dim=1, keepdim=True).clamp(min=1), strict=True))


def deepspeed_config(layout: Layout, optimizer: OptimizerConfig, precision: Precision, memory: MemoryEstimate) -> dict[str, Any]:
    """Build DeepSpeed's config only from our typed one: DeepSpeed accepts unknown keys without a warning."""
    # Number of elements of DeepSpeed's buffers: a fiftieth of the model's state. Its defaults are 500 million and more.
    elements = max(2**18, memory.total // 50 // 4)
    zero: dict[str, Any] = {
        "stage": layout.zero,
        "reduce_bucket_size": elements,
        "sub_group_size": elements,  # ZeRO-3 converts this many gradients to fp32 at once
        "stage3_model_persistence_threshold": elements,  # ZeRO-3 keeps small weights whole, up to this many elements in total
    }
    if layout.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device_type() == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": 1,  # never used to count or divide: `accumulate` marks the last micro batch
        "gradient_clipping": optimizer.gradient_clipping if layout.zero else 0.0,  # without ZeRO the engine clips
        "zero_optimization": zero,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice per micro batch
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW: faster than DeepSpeed's own in every combination
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would be compiled first
        "bf16": {"enabled": precision in ("bf16", "fp8")},
        "fp16": {"enabled": precision == "fp16", "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2},
    }
