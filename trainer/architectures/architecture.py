"""What the tables state about one model class of transformers. Defaults are those of most decoders, as in Llama."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from manta.trainer.architectures.tensor_map import Row

Keys = Mapping[str, "Key"]


@dataclass(frozen=True, slots=True)
class Key:
    """A key of config.json. `default`: the value that transformers uses if the key is omitted."""

    hf: str
    default: object = None
    older: str | None = None
    """Its name in older files."""
    twin: str | None = None
    """A second key that must have the same value."""


DECODER_KEYS: Keys = {
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
    keys: Keys = field(default_factory=lambda: DECODER_KEYS)
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
