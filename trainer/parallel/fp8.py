"""Matrix products in fp8 (Micikevicius et al. 2022) by torchao, in the linear layers of every block. Weights stay bf16, masters fp32.

Each row of an operand has its own scale (in the backward pass a weight has one for all rows), and weights' gradients are computed in bf16.
A token's result therefore depends on no other token, and how sequences are split over ranks and micro batches changes only the order of
sums. Without a GPU the products can be emulated, rounded as on a GPU, for parity tests; `require_fp8_gpu` prevents training that way.
"""

from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import nn

from manta.data.errors import InputError

CAPABILITY = (9, 0)  # row scales need NVIDIA's Hopper or newer


def require_fp8_gpu(device: torch.device) -> None:
    """Raise InputError if this device or installation has no fp8 products."""
    if device.type != "cuda":
        raise _refusal("no GPU on this rank")
    if (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise _refusal(f"{torch.cuda.get_device_name(device)} with {capability[0]}.{capability[1]}")
    if find_spec("torchao") is None:
        raise InputError("precision: expected torchao for fp8, got none. Run pip install 'manta[fp8]', or use bf16.")


def _refusal(got: str) -> InputError:
    expected = f"a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer for fp8"
    return InputError(f"precision: expected {expected}, got {got}. Use bf16.")


def convert_to_fp8(block: nn.Module, *, emulate: bool) -> None:
    """Replace the block's linear layers by layers with fp8 products. Weights keep their type and place."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # takes two seconds to import

    config = Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")
    convert_to_float8_training(block, config=replace(config, emulate=emulate))
