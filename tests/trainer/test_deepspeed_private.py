"""DeepSpeed still has the private parts that the engine and checkpoints use, and its import stays fast and quiet."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from parity import LINEAR, Cell, model, optimizer_config
from spmd import spmd

from manta.trainer.checkpoint.manifest import LOSS_SCALER_FIELDS
from manta.trainer.config.sections import ParallelConfig, TrainConfig
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine

CELLS = [
    *(Cell("llama", 2, parallel=ParallelConfig(zero=zero)) for zero in (0, 1, 2, 3)),
    Cell("llama", 2, parallel=ParallelConfig(zero=3, offload=True)),
    Cell("llama", 2, parallel=ParallelConfig(tensor=2)),
    *(Cell("moe", 2, parallel=ParallelConfig(expert=2, zero=zero)) for zero in (1, 3)),
    Cell("llama", 2, "fp16", ParallelConfig(zero=1)),
    Cell("llama", 2, "fp16", ParallelConfig(zero=3, offload=True)),
]


def build_engine(cell: Cell) -> Engine:
    torch.nn.functional.linear = LINEAR
    world = World.from_environment()
    mesh = world.mesh(layout_for(TrainConfig(steps=1, global_batch=4, micro_batch=1), cell.parallel, world.size))
    return Engine(model(cell.model), mesh=mesh, optimizer=optimizer_config("adamw"), precision=cell.precision)


def check_engine() -> None:
    """trainer/engine/deepspeed_private.py"""
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils import groups

    assert {"_configure_distributed_model", "_validate_zero3_moe_compatibility"} <= vars(DeepSpeedEngine).keys()
    assert {"mpu", "_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"} <= vars(groups).keys()
    assert deepspeed.ops.__compatible_ops__ == {"deepspeed_shm_comm": False}
    assert get_accelerator().is_fp16_supported()
    for cell in CELLS:
        engine = build_engine(cell)
        assert engine.deepspeed.has_moe_layers is (cell.model == "moe")


def check_fragments() -> None:
    """trainer/checkpoint/engine_state.py"""
    for cell in CELLS:
        engine = build_engine(cell)
        zero = engine.zero_optimizer
        match engine.layout.zero:
            case 1 | 2:
                assert {"single_partition_of_fp32_groups", "update_lp_params"} <= set(dir(zero))
                mappings = [p._hp_mapping for p in engine.module.parameters() if p._hp_mapping is not None]
                assert mappings
                for mapping in mappings:
                    for address in (mapping.lp_fragment_address, mapping.hp_fragment_address):
                        assert address.numel > 0 <= address.start
                    assert mapping.param_group_index in range(len(zero.param_groups))
            case 3:
                used = {"checkpoint_event_prologue", "checkpoint_event_epilogue", "_reassign_or_swap_out_partitioned_parameters"}
                assert used <= set(dir(zero))
                for parameter in engine.module.parameters():
                    group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
                    assert offset + size <= len(zero.fp32_partitioned_groups_flat[group])
                    assert size * dist.get_world_size(parameter.ds_process_group) >= parameter.ds_numel == math.prod(parameter.ds_shape)
        if cell.precision == "fp16":
            assert set(LOSS_SCALER_FIELDS) <= vars(zero.loss_scaler).keys()


@pytest.mark.parametrize("check", [check_engine, check_fragments])
def test_deepspeed_still_has_the_private_parts_that_we_use(check):
    spmd(check, 2)


IMPORT = """
import os, subprocess, sys

def refuse(*_, **__):
    raise AssertionError("a process was started")

subprocess.Popen.__init__ = refuse
import manta.trainer.engine.deepspeed
from manta.trainer.engine.deepspeed_private import LAZY_IMPORTS
import deepspeed.ops
assert set(LAZY_IMPORTS) <= set(sys.modules)
assert "torch._inductor.compile_fx" not in sys.modules, "something was compiled"
assert list(deepspeed.ops.__compatible_ops__) == ["deepspeed_shm_comm"], "operators were probed"
assert "TORCHDYNAMO_DISABLE" not in os.environ
"""


def test_importing_deepspeed_starts_no_process_and_compiles_nothing():
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    result = subprocess.run([sys.executable, "-P", "-c", IMPORT], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
