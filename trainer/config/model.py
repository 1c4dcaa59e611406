"""The `model` section of a config: the family and shape of a transformer, with or without a mixture of experts."""

from typing import Literal

from pydantic import Field, JsonValue, model_validator

from manta.data.errors import InputError, InvalidValueError
from manta.data.source_config import Section, Size
from manta.trainer.config.divisors import divisors_text


class ExpertsConfig(Section):
    """A mixture of experts in place of each block's MLP."""

    experts: Size = Field(ge=2, examples=[8])
    """Number of routed experts."""
    top_k: Size = Field(default=2, ge=1)
    """Experts that each token is routed to; no token is dropped."""
    width: Size = Field(ge=1, examples=[1024])
    """Inner width of each expert (SwiGLU)."""
    shared: Size = Field(default=0, ge=0)
    """Additional experts that process every token."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's logits become scores: softmax or sigmoid."""
    normalize: bool = True
    """Whether the scores of the selected experts are divided by their sum."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on the output of the routed experts."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """Load balancing of the experts: loss (an auxiliary loss per sequence), bias (which affects only the selection), or none."""
    balance_weight: float = Field(default=0.01, ge=0)
    """Weight of the auxiliary load-balancing loss."""
    bias_update_speed: float = Field(default=0.001, gt=0)
    """How far the bias moves in each step."""
    router_z_loss: float = Field(default=0.001, ge=0)
    """Weight of the router z-loss, which keeps the router's logits small."""

    @model_validator(mode="after")
    def _check_routing(self) -> "ExpertsConfig":
        if self.top_k > self.experts:
            raise InvalidValueError("top_k", f"at most experts ({self.experts})", self.top_k, "Lower it.", "experts")
        if self.top_k == 1 and self.normalize:  # a score divided by itself is 1, which has no gradient
            expected = "false with top_k 1, because the router would learn nothing"
            raise InvalidValueError("normalize", expected, True, "Set it to false.", "top_k")
        for key, balance in (("balance_weight", "loss"), ("bias_update_speed", "bias")):
            value = getattr(self, key)
            if self.balance != balance and value != type(self).model_fields[key].default:
                raise InvalidValueError(key, f"no value with balance {self.balance}", value, "Remove it.", "balance")
        return self


class ModelConfig(Section):
    """A transformer of one of the families, or your own model class."""

    preset: str | None = None
    """A named model, or a YAML file, whose values the other keys of this section override."""
    family: str = Field(default="llama", examples=["llama", "gpt2", "bert", "mine.model:Mine"])
    """llama, gpt2, bert, or the dotted path of your own class, package.module:Class (docs/own_model.md)."""
    layers: Size = Field(ge=1, examples=[12])
    """Number of blocks; a preset sets it."""
    width: Size = Field(ge=1, examples=[768])
    """Width of the residual stream; a preset sets it."""
    heads: Size = Field(ge=1, examples=[12])
    """Number of query heads; a preset sets it."""
    kv_heads: Size | None = Field(default=None, ge=1, examples=[12])
    """Number of key and value heads (grouped-query attention, llama), a divisor of heads. Default: heads."""
    head_width: Size | None = Field(default=None, ge=1)
    """Width of each head. Default: width / heads."""
    mlp_width: Size | None = Field(default=None, ge=1, examples=[2048])
    """Inner width of the MLP; unused with experts. Default: 4 x width."""
    positions: Size | None = Field(default=None, ge=1)
    """Number of learned positions (gpt2, bert). Default: data.sequence_length."""
    vocabulary: Size | None = Field(default=None, ge=1)
    """Number of tokens that the embedding holds. Default: the tokenizer's vocabulary."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary position embedding (llama)."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Added to the variance in each norm."""
    tied_head: bool = True
    """Whether the output head shares the embedding's weight."""
    qk_norm: bool = False
    """Whether the queries and keys of each head are normalized (llama)."""
    logit_soft_cap: float | None = Field(default=None, gt=0)
    """Soft cap: tanh bounds the logits to plus and minus this value (llama). Default: no cap."""
    sliding_window: Size | None = Field(default=None, ge=1)
    """Number of tokens that a token attends to, itself and those before it (llama). Default: all."""
    dropout: float = Field(default=0.0, ge=0, le=0.99)
    """Dropout rate of the embedding and of each residual branch."""
    attention_dropout: float = Field(default=0.0, ge=0, le=0.99)
    """Dropout rate of the attention weights."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target's probability that is spread over all tokens."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the z-loss, the squared log-sum-exp of the output logits, which keeps them small; 1e-4 is usual."""
    experts: ExpertsConfig | None = None
    """A mixture of experts in place of each MLP (llama, gpt2)."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Options for your own model class."""

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_dim(self) -> int:
        return self.head_width or self.width // self.heads

    @property
    def inner_width(self) -> int:
        return self.mlp_width or 4 * self.width

    def embedding_rows(self, tokenizer_vocabulary: int) -> int:
        """Return the number of tokens that the embedding holds. Raises InputError if the tokenizer has more."""
        if self.vocabulary is not None and self.vocabulary < tokenizer_vocabulary:
            expected = f"at least the tokenizer's {tokenizer_vocabulary}"
            raise InputError(f"model.vocabulary: expected {expected}, got {self.vocabulary}. Raise or omit it.")
        return self.vocabulary or tokenizer_vocabulary

    @model_validator(mode="after")
    def _check_heads(self) -> "ModelConfig":
        if self.heads % self.kv:
            remedy = f"Use {divisors_text(self.heads)}."
            raise InvalidValueError("kv_heads", f"a divisor of heads ({self.heads})", self.kv_heads, remedy, "heads")
        if self.head_width is None and self.width % self.heads:
            remedy = f"Use {divisors_text(self.width)}, or set head_width."
            raise InvalidValueError("heads", f"a divisor of width ({self.width})", self.heads, remedy, "width")
        if self.family == "llama" and self.head_dim % 2:
            if self.head_width is not None:
                expected = "an even number, because rotation turns pairs"
                raise InvalidValueError("head_width", expected, self.head_width, f"Use {self.head_width + 1}.")
            expected = f"an even width / heads, because rotation turns pairs (width is {self.width})"
            raise InvalidValueError("heads", expected, self.heads, f"Use {divisors_text(self.width // 2)}.", "width")
        return self

    @model_validator(mode="after")
    def _check_family(self) -> "ModelConfig":
        if ":" in self.family:
            return self
        if self.family not in FAMILY_KEYS:
            expected = f"{', '.join(FAMILY_KEYS)} or package.module:Class"
            raise InvalidValueError("family", expected, self.family, "Use one of them.")
        for key in sorted(set().union(*FAMILY_KEYS.values(), {"options"}) - FAMILY_KEYS[self.family]):
            value = getattr(self, key)
            if value != type(self).model_fields[key].get_default(call_default_factory=True):
                got = value.model_dump() if isinstance(value, Section) else value
                raise InvalidValueError(key, f"no value for family {self.family}", got, "Remove it.", "family")
        return self


FAMILY_KEYS = {
    "llama": {"kv_heads", "head_width", "rope_theta", "qk_norm", "logit_soft_cap", "sliding_window", "experts"},
    "gpt2": {"positions", "experts"},
    "bert": {"positions"},
}
"""Keys of the model section that only some families have."""
