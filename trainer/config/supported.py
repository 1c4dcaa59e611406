"""Which combinations of model, layout and precision are supported: those that a parity test proves. Pure functions."""

import math
from collections.abc import Iterator, Sequence

from manta.data.errors import InvalidValueError
from manta.trainer.config.divisors import divisors_text
from manta.trainer.config.model import ModelConfig
from manta.trainer.config.sections import ParallelConfig, Precision, TrainConfig

VOCABULARY_MULTIPLE = 128
"""Rows of embedding and head are padded to a multiple of this, in every layout."""
FP8_MULTIPLE = 16
"""Rows and columns of an 8-bit matrix product are multiples of this, as tensor cores require."""


def unsupported(
    model: ModelConfig, parallel: ParallelConfig, precision: Precision, train: TrainConfig, *, lengths: Sequence[int]
) -> Iterator[InvalidValueError]:
    """Yield an error for each reason why a run is not supported. lengths: data.sequence_length, then those of a curriculum."""
    yield from _indivisible_sizes(model, parallel, lengths)
    yield from _unproven(model, parallel, precision)
    if precision == "fp8":
        yield from _not_in_fp8(model, parallel)
    if train.compile:
        yield from _uncompilable(parallel)
    if parallel.zero == 3 and train.activation_checkpointing == "selective":
        # Linear layers add their bias in place to the kept product, so twice, and the recomputed pass gathers other weights.
        remedy = "Change it, or use zero 1 or 2."
        yield InvalidValueError("train.activation_checkpointing", "none or full under ZeRO-3", "selective", remedy, "parallel.zero")


def supports_compile(parallel: ParallelConfig) -> bool:
    """Whether blocks can be compiled, once for all layers."""
    return next(_uncompilable(parallel), None) is None


def _uncompilable(parallel: ParallelConfig) -> Iterator[InvalidValueError]:
    key = "train.compile"
    if parallel.zero == 3:
        expected = "false under ZeRO-3, whose hooks break the graph at every layer"
        yield InvalidValueError(key, expected, True, "Omit it, or use zero 1 or 2.", "parallel.zero")
    if parallel.tensor > 1:
        expected = f"false with parallel.tensor {parallel.tensor}, where each layer would be recompiled"
        yield InvalidValueError(key, expected, True, "Omit it.", "parallel.tensor")


def _indivisible_sizes(model: ModelConfig, parallel: ParallelConfig, lengths: Sequence[int]) -> Iterator[InvalidValueError]:
    experts = model.experts
    if experts is None and parallel.expert > 1:
        yield InvalidValueError("parallel.expert", "1 for a model without experts", parallel.expert, "Set model.experts, or omit it.")
    inner = ("model.mlp_width", model.inner_width) if experts is None else ("model.experts.width", experts.width)
    heads = [("model.heads", model.heads), ("model.kv_heads", model.kv)]
    vocabulary = ("the vocabulary's padding", VOCABULARY_MULTIPLE)
    named_lengths = [("data.sequence_length", lengths[0]), *(("data.curriculum's sequence_length", length) for length in lengths[1:])]
    for key, parts, sizes in (
        ("parallel.tensor", parallel.tensor, [*heads, inner, vocabulary]),
        ("parallel.sequence", parallel.sequence, [*heads, *named_lengths]),
        ("parallel.tensor x parallel.sequence", parallel.tensor * parallel.sequence, heads),
        ("parallel.expert", parallel.expert, [] if experts is None else [("model.experts.experts", experts.experts)]),
    ):
        for name, size in sizes:
            if size % parts:
                remedy = f"Use {divisors_text(math.gcd(*(size for _, size in sizes)))}."
                yield InvalidValueError(key, f"a divisor of {name} ({size})", parts, remedy, name, *key.split(" x "))


def _unproven(model: ModelConfig, parallel: ParallelConfig, precision: Precision) -> Iterator[InvalidValueError]:
    if parallel.zero == 0 and precision in ("bf16", "fp16", "fp8"):
        stages = "1 or 2" if precision == "fp8" else "1, 2 or 3"
        expected = f"{stages} in {precision}, because DeepSpeed without ZeRO does not keep fp32 masters as it should"
        yield InvalidValueError("parallel.zero", expected, 0, f"Use {stages}.", "precision")
    if parallel.zero == 0 and parallel.offload:
        expected = "false without ZeRO, which offloads nothing"
        yield InvalidValueError("parallel.offload", expected, True, "Use zero 1, 2 or 3.", "parallel.zero")
    if parallel.tensor > 1 and parallel.expert > 1:
        expected = f"1 with parallel.tensor {parallel.tensor}, because no parity test proves both"
        yield InvalidValueError("parallel.expert", expected, parallel.expert, "Use one of the two.", "parallel.tensor")
    if ":" in model.family:
        for name in ("tensor", "sequence", "expert"):
            if (size := getattr(parallel, name)) > 1:
                expected = "1 for your own model, which is proven only under ZeRO"
                yield InvalidValueError(f"parallel.{name}", expected, size, "Omit it.", "model.family")


def _not_in_fp8(model: ModelConfig, parallel: ParallelConfig) -> Iterator[InvalidValueError]:
    """fp8 products keep the weights that ZeRO-3 gathers until the backward pass, and do not know products that ranks share."""
    if parallel.zero == 3:
        expected = "1 or 2 in fp8, which keeps the weights that ZeRO-3 gathers"
        yield InvalidValueError("parallel.zero", expected, 3, "Use 1 or 2.", "precision")
    if parallel.tensor > 1:
        expected = "1 in fp8, because no parity test proves both"
        yield InvalidValueError("parallel.tensor", expected, parallel.tensor, "Omit it, or use bf16.", "precision")
    if ":" in model.family:
        expected = "another one for your own model, which is not proven in fp8"
        yield InvalidValueError("precision", expected, "fp8", "Use bf16.", "model.family")
    experts = model.experts
    inner = ("model.mlp_width", model.inner_width) if experts is None else ("model.experts.shared x width", experts.shared * experts.width)
    heads = [(f"model.{key} x head_width", count * model.head_dim) for key, count in (("heads", model.heads), ("kv_heads", model.kv))]
    for key, size in (("model.width", model.width), *heads, inner):
        if size % FP8_MULTIPLE:
            yield InvalidValueError(key, f"a multiple of {FP8_MULTIPLE} in fp8", size, "Change it, or use bf16.", "precision")
