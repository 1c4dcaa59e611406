"""Products in 8 bits (Micikevicius et al. 2022), by torchao: the linear layers of every block, weights bf16 and their masters fp32 as ever.

Each row of what is multiplied has a scale of its own (on the way back a weight has one for all), and weights' gradients are made in bf16:
so a token's result hangs on no other token, and how sequences are dealt to ranks and micro batches changes nothing but the order of
sums. Without a GPU the products can be emulated, rounded as on one: for proofs. `ask_for_gpu` keeps people from training so.
"""

from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import nn

from manta.data.errors import InputError

CAPABILITY = (9, 0)  # with a scale for each row, from NVIDIA's Hopper on


def ask_for_gpu(device: torch.device) -> None:
    """Raises InputError where products in 8 bits can not be had."""
    wants = f"precision: got fp8, which wants a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer"
    if device.type != "cuda":
        raise InputError(f"{wants}, and this rank has none; use bf16")
    if (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise InputError(f"{wants}, and {name} has {capability[0]}.{capability[1]}; use bf16")
    if find_spec("torchao") is None:
        raise InputError("precision: got fp8, which wants torchao; pip install torchao, or use bf16")


def multiply_in_fp8(block: nn.Module, *, emulate: bool) -> None:
    """Puts products in 8 bits in the place of the block's linear layers. Weights stay what they are, and where."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # two seconds, for those alone who need it

    config = Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")
    convert_to_float8_training(block, config=replace(config, emulate=emulate))
