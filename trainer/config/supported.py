"""What is not run, and why: what parity was not proven for, or was seen to fail. Pure, and asked before anything starts."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it is the config that asks
    from manta.trainer.config.model import ModelConfig
    from manta.trainer.config.training import ParallelConfig, Precision

VOCABULARY_MULTIPLE = 128
"""Rows of embedding and head are padded to this, the same for every layout."""
FP8_MULTIPLE = 16
"""Rows and columns of a product in 8 bits, as tensor cores want them."""


def refusal(
    model: "ModelConfig",
    parallel: "ParallelConfig",
    precision: "Precision",
    *,
    sequence_length: int,
    curriculum: Sequence[int] = (),
    compiled: bool = False,
    recompute: str = "none",
) -> str | None:
    """Why this is not run, in a line; None where it is run."""
    reasons = (
        _indivisible(model, parallel, sequence_length, curriculum),
        _unproven(model, parallel, precision),
        _recompiled(parallel, compiled=compiled),
        _recomputed(parallel, recompute),
    )
    return next(chain(*reasons), None)


def compiles(parallel: "ParallelConfig") -> bool:
    """Whether blocks may be compiled: once for all layers, that is."""
    return next(_recompiled(parallel, compiled=True), None) is None


def _recompiled(parallel: "ParallelConfig", *, compiled: bool) -> Iterator[str]:
    if compiled and parallel.zero == 3:
        yield "train.compile: got true, and ZeRO-3's hooks break the graph at every layer; leave it out or use zero 1 or 2"
    if compiled and parallel.tensor > 1:
        yield f"train.compile: got true, and under parallel.tensor {parallel.tensor} each layer would be compiled anew; leave it out"


def _recomputed(parallel: "ParallelConfig", recompute: str) -> Iterator[str]:
    """Under ZeRO-3 linear layers add their bias to the kept product in place, twice then, and gathers are not as many the second time."""
    if parallel.zero == 3 and recompute == "selective":
        yield "train.activation_checkpointing: got selective, which goes wrong under ZeRO-3; use full or none, or zero 1 or 2"


def _indivisible(model: "ModelConfig", parallel: "ParallelConfig", sequence_length: int, curriculum: Sequence[int]) -> Iterator[str]:
    experts = model.experts
    if experts is None and parallel.expert > 1:
        yield f"parallel.expert: got {parallel.expert}, and the model has no experts; set model.experts or leave it out"
    inner = ("model.mlp_width", model.inner) if experts is None else ("model.experts.width", experts.width)
    heads = [("model.heads", model.heads), ("model.kv_heads", model.kv)]
    vocabulary = ("the vocabulary's multiple", VOCABULARY_MULTIPLE)
    lengths = [("data.sequence_length", sequence_length), *(("data.curriculum's sequence_length", length) for length in curriculum)]
    for key, parts, sizes in (
        ("parallel.tensor", parallel.tensor, [*heads, inner, vocabulary]),
        ("parallel.sequence", parallel.sequence, [*heads, *lengths]),
        ("parallel.tensor x parallel.sequence", parallel.tensor * parallel.sequence, heads),
        ("parallel.expert", parallel.expert, [] if experts is None else [("model.experts.experts", experts.experts)]),
    ):
        for what, size in sizes:
            if size % parts:
                fitting = divisors(math.gcd(*(size for _, size in sizes)))
                yield f"{key}: got {parts}, wants a divisor of {what} {size}; use {fitting}"


def divisors(n: int) -> str:
    """In words: `1, 2, 4 or 8`; of many the smallest and the largest."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    found = sorted({*small, *(n // d for d in small)})
    if len(found) > 8:
        found = found[:4] + found[-4:]
    return " or ".join(filter(None, [", ".join(map(str, found[:-1])), str(found[-1])]))


def _unproven(model: "ModelConfig", parallel: "ParallelConfig", precision: "Precision") -> Iterator[str]:
    tensor, sequence, expert, zero = parallel.tensor, parallel.sequence, parallel.expert, parallel.zero
    if zero == 0 and precision in ("bf16", "fp16", "fp8"):
        stages = "1 or 2" if precision == "fp8" else "1, 2 or 3"
        yield f"parallel.zero: got 0, which goes wrong in {precision}: DeepSpeed then keeps no fp32 masters as it should; use {stages}"
    if zero == 0 and parallel.offload:
        yield "parallel.offload: got true, and without ZeRO nothing is offloaded; use zero 1, 2 or 3"
    if tensor > 1 and expert > 1:
        yield f"parallel.expert: got {expert}, not proven beside parallel.tensor {tensor}; use one of the two"
    if ":" in model.family and max(tensor, sequence, expert) > 1:
        yield "parallel: a model of your own is proven under ZeRO alone; leave out tensor, sequence and expert"
    if precision == "fp8":
        yield from _not_in_fp8(model, parallel)


def _not_in_fp8(model: "ModelConfig", parallel: "ParallelConfig") -> Iterator[str]:
    """Its products keep the weights that ZeRO-3 gathered for the backward pass, and know nothing of a product that ranks share."""
    if parallel.zero == 3:
        yield "parallel.zero: got 3, and fp8 would keep whole what ZeRO-3 has gathered; use 1 or 2"
    if parallel.tensor > 1:
        yield f"parallel.tensor: got {parallel.tensor}, not proven in fp8; leave it out, or use bf16"
    if ":" in model.family:
        yield "precision: got fp8, not proven with a model of your own; use bf16"
    experts = model.experts
    inner = ("model.mlp_width", model.inner) if experts is None else ("model.experts.shared x width", experts.shared * experts.width)
    heads = [(f"model.{key} x head_width", count * model.each_head) for key, count in (("heads", model.heads), ("kv_heads", model.kv))]
    for key, size in (("model.width", model.width), *heads, inner):
        if size % FP8_MULTIPLE:
            yield f"{key}: got {size}, wants a multiple of {FP8_MULTIPLE} in fp8; change it, or use bf16"
