"""One ordered function puts a layout around a model that knows no ranks."""

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from manta.trainer.dist import sharding
from manta.trainer.dist.world import Mesh
from manta.trainer.hardware.compiler import ask_for_compiler
from manta.trainer.hardware.device import device_type
from manta.trainer.model.moe import MixtureOfExperts
from manta.trainer.model.transformer import Transformer
from manta.trainer.parallel import expert, tensor, ulysses
from manta.trainer.parallel.fp8 import multiply_in_fp8

PRODUCTS = {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "_grouped_mm",
        "_scaled_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}
Recompute = Literal["none", "selective", "full"]


def parallelize(model: Transformer, mesh: Mesh, *, recompute: Recompute = "none", compile_blocks: bool = False, fp8: bool = False) -> None:
    """Cuts the weights, puts the exchanges in, then products in 8 bits, recomputation, compilation: each around what came before."""
    if compile_blocks:
        ask_for_compiler(device_type())
    cut(model, mesh.part)
    if mesh.layout.expert > 1:
        expert.share(model, mesh.expert)
    if mesh.layout.tensor > 1:
        tensor.share(model, mesh.tensor)
    if mesh.layout.sequence > 1:
        ulysses.share(model, mesh.sequence)
    for block in model.blocks:
        if fp8:
            multiply_in_fp8(block, emulate=device_type() == "cpu")
        if compile_blocks:
            _compile(block, recompute)
        elif recompute != "none":
            _recompute(block, recompute)


def _compile(block: Any, recompute: Recompute) -> None:
    mixtures: list[Any] = [module for module in block.modules() if isinstance(module, MixtureOfExperts)]
    for mixture in mixtures:  # how many rows an expert has is data: the graph is broken there, and nowhere else
        mixture.forward = torch.compiler.disable(mixture.forward)
    if mixtures:
        block.forward = torch.compile(block.forward, dynamic=False)  # within recomputation: around a broken graph it would compile nothing
    if recompute != "none":
        _recompute(block, recompute)
    if not mixtures:
        block.compile(dynamic=False)  # once for each sequence length: code for any of them would be slower for all


def cut(model: nn.Module, part: sharding.Part) -> None:
    """Leaves this rank its part of each weight. Tied weights stay tied."""
    for name, parameter in model.named_parameters():
        here = sharding.local(name, parameter.shape, part)
        parameter.data = parameter.data[here].clone()  # the rest is freed


def _recompute(block: Any, recompute: Recompute) -> None:
    block.forward = partial(_recomputed, block.forward, selective=recompute == "selective")


def _recomputed(forward: Any, *given: Any, selective: bool) -> Any:
    if not torch.is_grad_enabled():
        return forward(*given)
    contexts: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _keep_products)} if selective else {}
    # Nothing of ours asks torch's generators: dropout is hashed.
    return checkpoint(forward, *given, use_reentrant=False, preserve_rng_state=False, **contexts)


def _keep_products(_: object, operation: Any, *__: object, **___: object) -> CheckpointPolicy:
    """What costs the most to do again is kept; the rest, which holds the most memory, is done again."""
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
