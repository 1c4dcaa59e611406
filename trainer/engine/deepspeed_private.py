"""DeepSpeed's import, and every private part of it that the engine uses. tests/trainer/test_deepspeed_private.py names them all.

Besides those below: the attributes that Megatron and AutoEP set on weights, which `mark_sharded` sets as well.
"""

import importlib
import logging
import os
import warnings
from math import nan
from typing import Any

import torch

from manta.trainer.dist.world import Mesh
from manta.trainer.hardware import device_type
from manta.trainer.model.transformer import Transformer
from manta.trainer.parallel.sharding import is_sharded

os.environ["DS_ACCELERATOR"] = device_type()  # otherwise the import tries every vendor's accelerator
os.environ.setdefault("LOCAL_SIZE", "1")  # otherwise, on CPU, each of ZeRO-3's reductions runs numactl to count devices

import deepspeed
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups

LAZY_IMPORTS = ("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.zero.stage3")


def _set_up() -> None:
    """Prevent DeepSpeed from compiling, probing and warning, and import what it would import later: a hot standby must have it all."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of an optimizer that is not its own
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # ZeRO-3 calls deprecated names
    operators: Any = deepspeed.ops
    # On CPU the first collective would compile this operator, for half a minute, and training is as fast without it. Reading the attribute
    # instead of setting it would probe a toolkit for every operator.
    operators.__compatible_ops__ = {"deepspeed_shm_comm": False}
    accelerator: Any = get_accelerator()
    accelerator.is_fp16_supported = lambda: True  # torch computes fp16 on every CPU, only slowly
    importlib.import_module("torch._dynamo")
    # Importing Muon compiles its functions, which takes a quarter of the start-up, for an optimizer that we do not use.
    is_set = "TORCHDYNAMO_DISABLE" in os.environ
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    for name in LAZY_IMPORTS:
        importlib.import_module(name)
    if not is_set:
        del os.environ["TORCHDYNAMO_DISABLE"]


_set_up()


class _MarkedEngine(DeepSpeedEngine):
    """DeepSpeed's engine, which recognizes our experts by the marks on their weights instead of by its own layers."""

    def _configure_distributed_model(self, model: Any) -> None:
        super()._configure_distributed_model(model)
        self.has_moe_layers = any(hasattr(parameter, "group_name") for parameter in model.parameters())

    def _validate_zero3_moe_compatibility(self) -> None:
        """Accept expert layers that DeepSpeed does not know: parity tests cover ours."""


def build_deepspeed(model: Transformer, mesh: Mesh, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> DeepSpeedEngine:
    """Return DeepSpeed's engine for a model with sharded and marked weights."""
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    mpu = mesh if mesh.layout.tensor > 1 else None
    groups.mpu = None  # may be left from another engine in this process
    return _MarkedEngine(args=None, model=model, optimizer=optimizer, mpu=mpu, config=config, config_class=DeepSpeedConfig(config, mpu))


def mark_sharded(model: Transformer, mesh: Mesh) -> None:
    """Mark which weights are sharded over which ranks: ZeRO needs it for reductions, partitions and the gradient norm."""
    name = f"ep_size_{mesh.layout.expert}"
    private: Any = groups
    private._EXPERT_PARALLEL_GROUP = {name: mesh.expert}  # noqa: SLF001
    private._EXPERT_DATA_PARALLEL_GROUP = {name: mesh.expert_replicas}  # noqa: SLF001
    for weight, parameter in model.named_parameters():
        marked: Any = parameter
        if is_sharded(weight, mesh.shard, "tensor"):
            marked.tensor_model_parallel = True
        if is_sharded(weight, mesh.shard, "expert"):
            marked.allreduce = False
            marked.group_name = marked.ds_zero_partition_group_name = name
            marked.ds_zero_placement_family = "autoep_expert"


def global_grad_norm(optimizer: Any) -> float:
    """Return the gradient norm over all ranks that a ZeRO optimizer has computed in this step; NaN if a gradient is not finite."""
    norm = float(optimizer._global_grad_norm)  # noqa: SLF001  needed before the step is done
    return nan if norm < 0 else norm  # DeepSpeed's mark of one that is not finite
