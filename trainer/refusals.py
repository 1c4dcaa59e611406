"""What is not run, and why: all that the parity table does not hold. Pure, and asked before anything starts."""

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it is the config that asks
    from manta.trainer.config import ModelConfig, ParallelConfig, Precision

VOCABULARY_MULTIPLE = 128
"""Rows of embedding and head are padded to this, the same for every layout."""


def refusal(model: "ModelConfig", parallel: "ParallelConfig", precision: "Precision", *, sequence_length: int) -> str | None:
    """Why this is not run, in a line; None where it is on the parity table."""
    return next(chain(_indivisible(model, parallel, sequence_length), _unproven(model, parallel, precision)), None)


def _indivisible(model: "ModelConfig", parallel: "ParallelConfig", sequence_length: int) -> Iterator[str]:
    experts = model.experts
    if experts is None and parallel.expert > 1:
        yield f"parallel.expert: got {parallel.expert}, and the model has no experts; set model.experts or leave it out"
    inner = ("model.mlp_width", model.inner) if experts is None else ("model.experts.width", experts.width)
    for key, parts, what, size in (
        ("parallel.tensor", parallel.tensor, "model.heads", model.heads),
        ("parallel.tensor", parallel.tensor, "model.kv_heads", model.kv),
        ("parallel.tensor", parallel.tensor, *inner),
        ("parallel.tensor", parallel.tensor, "the vocabulary's multiple", VOCABULARY_MULTIPLE),
        ("parallel.sequence", parallel.sequence, "model.heads", model.heads),
        ("parallel.sequence", parallel.sequence, "model.kv_heads", model.kv),
        ("parallel.sequence", parallel.sequence, "data.sequence_length", sequence_length),
        ("parallel.expert", parallel.expert, "model.experts.experts", parallel.expert if experts is None else experts.experts),
    ):
        if size % parts:
            yield f"{key}: got {parts}, wants a divisor of {what} {size}; use another"


def _unproven(model: "ModelConfig", parallel: "ParallelConfig", precision: "Precision") -> Iterator[str]:
    tensor, sequence, expert, zero = parallel.tensor, parallel.sequence, parallel.expert, parallel.zero
    if zero == 0 and precision in ("bf16", "fp16"):
        yield f"parallel.zero: got 0, which goes wrong in {precision}: DeepSpeed then keeps no fp32 masters as it should; use 1, 2 or 3"
    if zero == 0 and parallel.offload:
        yield "parallel.offload: got true, and without ZeRO nothing is offloaded; use zero 1, 2 or 3"
    if tensor > 1 and expert > 1:
        yield f"parallel.expert: got {expert}, not proven beside parallel.tensor {tensor}; use one of the two"
    if ":" in model.family and max(tensor, sequence, expert) > 1:
        yield "parallel: a model of your own is proven under ZeRO alone; leave out tensor, sequence and expert"
    if precision == "fp8":
        yield "precision: got fp8, proven on no machine yet; use bf16"
