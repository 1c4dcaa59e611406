"""Apply a layout to a single-device model, in one ordered function."""

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from manta.trainer.dist.layout import WeightShard
from manta.trainer.dist.world import Mesh
from manta.trainer.hardware import device_type, require_compiler
from manta.trainer.model.moe import MixtureOfExperts
from manta.trainer.model.transformer import Transformer
from manta.trainer.parallel.expert import apply_expert_parallel
from manta.trainer.parallel.fp8 import convert_to_fp8
from manta.trainer.parallel.sharding import local_slices
from manta.trainer.parallel.tensor import apply_tensor_parallel
from manta.trainer.parallel.ulysses import apply_ulysses

ATTENTION = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
PRODUCTS = ("mm", "addmm", "bmm", "_grouped_mm", "_scaled_mm", *(f"_scaled_dot_product_{name}" for name in ATTENTION))
MATRIX_PRODUCTS = {getattr(torch.ops.aten, name).default for name in PRODUCTS}
ActivationCheckpointing = Literal["none", "selective", "full"]


def parallelize(
    model: Transformer, mesh: Mesh, *, checkpointing: ActivationCheckpointing = "none", compile_blocks: bool = False, fp8: bool = False
) -> None:
    """Shard the weights, add the collectives, then fp8, activation checkpointing and compilation, each around what came before."""
    if compile_blocks:
        require_compiler(device_type())
    shard_weights(model, mesh.shard)
    if mesh.layout.expert > 1:
        apply_expert_parallel(model, mesh.expert)
    if mesh.layout.tensor > 1:
        apply_tensor_parallel(model, mesh.tensor)
    if mesh.layout.sequence > 1:
        apply_ulysses(model, mesh.sequence)
    for block in model.blocks:
        if fp8:
            convert_to_fp8(block, emulate=device_type() == "cpu")
        if compile_blocks:
            _compile(block, checkpointing)
        else:
            _checkpoint(block, checkpointing)


def shard_weights(model: nn.Module, shard: WeightShard) -> None:
    """Keep this rank's shard of each weight and free the rest. Tied weights stay tied."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data[local_slices(name, parameter.shape, shard)].clone()


def _compile(block: Any, checkpointing: ActivationCheckpointing) -> None:
    mixtures: list[Any] = [module for module in block.modules() if isinstance(module, MixtureOfExperts)]
    for mixture in mixtures:  # an expert's number of rows is data: it breaks the graph here, and nowhere else
        mixture.forward = torch.compiler.disable(mixture.forward)
    if mixtures:
        block.forward = torch.compile(block.forward, dynamic=False)  # inside checkpointing: around a broken graph it would compile nothing
    _checkpoint(block, checkpointing)
    if not mixtures:
        block.compile(dynamic=False)  # once for each sequence length: code for any length is slower


def _checkpoint(block: Any, checkpointing: ActivationCheckpointing) -> None:
    if checkpointing != "none":
        block.forward = partial(_checkpointed, block.forward, selective=checkpointing == "selective")


def _checkpointed(forward: Any, *inputs: Any, selective: bool) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    contexts: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _keep_products)} if selective else {}
    # Nothing uses torch's generators: dropout is hashed.
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts)


def _keep_products(_: object, operation: Any, *__: object, **___: object) -> CheckpointPolicy:
    """Keep what costs the most to recompute; recompute the rest, which takes the most memory."""
    return CheckpointPolicy.MUST_SAVE if operation in MATRIX_PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
