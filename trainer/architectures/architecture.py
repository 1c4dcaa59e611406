"""What the tables state about one model class of transformers, and which of our tensors are which of its tensors.

Defaults are those of most decoders, as in Llama. Shapes: D width, F inner width, E experts, V vocabulary.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manta.trainer.config.model import ModelConfig

Tensors = Sequence[Tensor]
VOCABULARY_ROWS = {"embedding.weight", "head.weight", "head.bias"}  # first dimension V; only ours may be padded


@dataclass(frozen=True, slots=True)
class Transform:
    to_hf: Callable[[Tensors], Tensors]
    from_hf: Callable[[Tensors], Tensors]


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.ndim == 2 else tensor  # a bias stays


IDENTITY = Transform(lambda ours: ours, lambda hf: hf)
TRANSPOSE = Transform(lambda ours: [_transpose(t) for t in ours], lambda hf: [_transpose(t) for t in hf])
FUSE_TRANSPOSE = Transform(lambda ours: [_transpose(torch.cat(list(ours)))], lambda hf: _transpose(hf[0]).chunk(3))
SPLIT_EXPERTS = Transform(lambda ours: ours[0].unbind(), lambda hf: [torch.stack(list(hf))])
# transformers stores the bias of BERT's untied head twice, and reads the one beside the weight.
UNTIED_HEAD = Transform(lambda ours: [*ours, ours[1].clone()], lambda hf: hf[:2])


@dataclass(frozen=True, slots=True)
class Row:
    """Names of tensors, or of modules: then the row maps their .weight and .bias. Several are separated by spaces.

    {e} is the number of an expert.
    """

    ours: str
    hf: str
    transform: Transform = IDENTITY


def rows(ours: str, hf: str, parts: str, transform: Transform = IDENTITY) -> tuple[Row, ...]:
    """Return a row for each part, a name that replaces * on both sides."""
    return tuple(Row(ours.replace("*", part), hf.replace("*", part), transform) for part in parts.split())


@dataclass(frozen=True, slots=True)
class Key:
    """A key of config.json. `default`: the value that transformers uses if the key is omitted."""

    hf: str
    default: object = None
    older: str | None = None
    """Its name in older files."""
    twin: str | None = None
    """A second key that must have the same value."""


DECODER_KEYS: Mapping[str, Key] = {
    "vocabulary": Key("vocab_size"),
    "width": Key("hidden_size"),
    "mlp_width": Key("intermediate_size"),
    "layers": Key("num_hidden_layers"),
    "heads": Key("num_attention_heads"),
    "kv_heads": Key("num_key_value_heads"),
    "head_width": Key("head_dim"),
    "norm_epsilon": Key("rms_norm_eps", 1e-6),
    "tied_head": Key("tie_word_embeddings", default=False),
    "attention_dropout": Key("attention_dropout", 0.0),
}
DECODER_CONSTANTS: Mapping[str, object] = {"hidden_act": "silu", "attention_bias": False}
DECODER_TENSORS = (Row("embedding", "model.embed_tokens"), Row("norm", "model.norm"), Row("head", "lm_head"))


def _tied_head() -> dict[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    name: str
    model_type: str
    family: str = "llama"
    """Our model.family."""
    keys: Mapping[str, Key] = field(default_factory=lambda: DECODER_KEYS)
    """Our config keys (dotted), and the class's."""
    constants: Mapping[str, object] = field(default_factory=lambda: DECODER_CONSTANTS)
    """The class's keys that our family has no choice in, with the only value that fits."""
    constant_defaults: Mapping[str, object] = field(default_factory=dict[str, object])
    """What transformers uses for an omitted constant, if that does not fit."""
    requires: Mapping[str, tuple[object, ...]] = field(default_factory=dict[str, tuple[object, ...]])
    """Our config keys that the class lacks, with the values that fit; an import gets the first."""
    needs_divisible_width: bool = False
    """Whether width must be a multiple of heads."""
    needs_shared_expert: bool = False
    rope_theta: float | None = 1e4
    """What transformers uses if it is omitted; None for learned positions."""
    partial_rotary_factor: float | None = None
    """What transformers uses if it is omitted; None if the class has no such key."""
    has_window_switch: bool = False
    """Whether the class has use_sliding_window."""
    has_window_layers: bool = False
    """Whether the class has max_window_layers and layer_types."""
    tensors: tuple[Row, ...] = DECODER_TENSORS
    """Outside of blocks."""
    block: str = "model.layers"
    block_tensors: tuple[Row, ...]
    copies: Mapping[str, str] = field(default_factory=_tied_head)
    """Tensors that files of a tied model may hold a second time, and the originals."""
    old_names: tuple[tuple[str, str], ...] = ()
    """Substitutions that turn tensor names of older files into today's."""
    memory_names: tuple[tuple[str, str], ...] = ()
    """Substitutions that turn tensor names of a model in memory into those of its files, if they differ."""
    buffers: str = "$."
    """Pattern for tensors in files that are not weights; the default matches nothing."""

    @property
    def has_experts(self) -> bool:
        return "experts.experts" in self.keys


@dataclass(frozen=True, slots=True)
class TensorMapping:
    """A row for one block of one model."""

    ours: tuple[str, ...]
    hf: tuple[str, ...]
    transform: Transform

    def to_hf(self, ours: Mapping[str, Tensor], vocabulary: int | None) -> dict[str, Tensor]:
        """Return transformers' tensors by name, views if possible. vocabulary: rows that are not padding; None: all."""
        tensors = [ours[name][:vocabulary] if name in VOCABULARY_ROWS else ours[name] for name in self.ours]
        return dict(zip(self.hf, self.transform.to_hf(tensors), strict=True))

    def from_hf(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return our tensors by name, without padding of the vocabulary."""
        return dict(zip(self.ours, self.transform.from_hf([read(name) for name in self.hf]), strict=True))


def map_tensors(architecture: Architecture, config: ModelConfig, names: Collection[str]) -> list[TensorMapping]:
    """Return the mappings of a model with these tensor names, each of which is in exactly one.

    First those outside of blocks, then block by block. A row without tensors in this model is skipped.
    """
    rows = [("", "", row) for row in architecture.tensors]
    for i in range(config.layers):
        rows += [(f"blocks.{i}.", f"{architecture.block}.{i}.", row) for row in architecture.block_tensors]
    experts = range(config.experts.experts if config.experts else 0)
    unmapped, mappings = set(names), list[TensorMapping]()
    for prefix, hf_prefix, row in rows:
        for ending in ("", ".weight", ".bias"):
            ours = tuple(f"{prefix}{name}{ending}" for name in row.ours.split())
            if unmapped.issuperset(ours):
                hf = [f"{hf_prefix}{name}{ending}" for name in row.hf.split()]
                hf = [name.replace("{e}", str(e)) for name in hf for e in (experts if "{e}" in name else [0])]
                mappings.append(TensorMapping(ours, tuple(hf), row.transform))
                unmapped.difference_update(ours)
    assert not unmapped, f"no row for {sorted(unmapped)}"
    return mappings


def hf_shapes(mappings: Iterable[TensorMapping], tensors: Mapping[str, Tensor], vocabulary: int | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of transformers' tensors by name. `tensors`: ours, by name."""
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    return {name: tuple(hf.shape) for mapping in mappings for name, hf in mapping.to_hf(meta, vocabulary).items()}


def padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a copy in fp32, with zeros for the rows that only ours has."""
    whole = torch.zeros(shape, dtype=torch.float32)
    whole[: len(tensor)].copy_(tensor)
    return whole


def substitute(name: str, patterns: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name
