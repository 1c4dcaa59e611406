"""The `model` section of a run's config: a transformer's family and shape, and a mixture of experts in it."""

from typing import Literal

from pydantic import Field, JsonValue, model_validator

from manta.data.sources.config import Section
from manta.trainer.config.supported import divisors


class ExpertsConfig(Section):
    """A mixture of experts in place of each block's MLP."""

    experts: int = Field(ge=2, examples=[8])
    """Number of routed experts."""
    top_k: int = Field(default=2, ge=1)
    """Experts that each token goes to; none is ever dropped."""
    width: int = Field(ge=1, examples=[1024])
    """Inner width of each expert (SwiGLU)."""
    shared: int = Field(default=0, ge=0)
    """Experts that every token goes to besides."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's logits become scores."""
    normalize: bool = True
    """Whether the chosen scores are divided by their sum."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on what the routed experts give."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """How experts are kept evenly loaded: an auxiliary loss for each sequence, or a bias on the choice alone."""
    balance_weight: float = Field(default=0.01, ge=0)
    """Weight of the auxiliary loss."""
    bias_update_speed: float = Field(default=0.001, gt=0)
    """How far the bias moves in each step."""
    router_z_loss: float = Field(default=0.001, ge=0)
    """Weight of the router z-loss, which keeps the router's logits small."""

    @model_validator(mode="after")
    def _enough(self) -> "ExpertsConfig":
        if self.top_k > self.experts:
            raise ValueError(f"top_k: got {self.top_k}, wants at most experts {self.experts}; lower it")
        if self.top_k == 1 and self.normalize:  # a score divided by itself is 1, and has no gradient
            raise ValueError("normalize: got true, and with top_k 1 a router then never learns; set it to false")
        for key, balance in (("balance_weight", "loss"), ("bias_update_speed", "bias")):
            if self.balance != balance and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: got {getattr(self, key)}, and balance {self.balance} has none; leave it out")
        return self


class ModelConfig(Section):
    """A transformer of one of the families, or a model of your own."""

    preset: str | None = None
    """A named model to start from; every other key of this section overrides it."""
    family: str = Field(default="llama", examples=["llama", "gpt2", "bert", "mine.model:Mine"])
    """llama, gpt2, bert, or the dotted path of your own class, package.module:Class (docs/models.md)."""
    layers: int = Field(ge=1, examples=[12])
    """Number of blocks."""
    width: int = Field(ge=1, examples=[768])
    """Width of the residual stream."""
    heads: int = Field(ge=1, examples=[12])
    """Number of query heads."""
    kv_heads: int | None = Field(default=None, ge=1, examples=[12])
    """Number of key and value heads (grouped-query attention, llama); divides heads; as many as heads where left out."""
    head_width: int | None = Field(default=None, ge=1)
    """Width of each head; width / heads where left out."""
    mlp_width: int | None = Field(default=None, ge=1, examples=[2048])
    """Inner width of the MLP, where there are no experts; 4 x width where left out."""
    positions: int | None = Field(default=None, ge=1)
    """Learned positions (gpt2, bert); data.sequence_length where left out."""
    vocabulary: int | None = Field(default=None, ge=1)
    """Tokens that the embedding has room for; the tokenizer's vocabulary where left out."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary position embedding (llama)."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Added to the variance under the root of each norm."""
    tied_head: bool = True
    """Whether the output head shares the embedding's weight."""
    qk_norm: bool = False
    """Whether queries and keys are normalized, each head (llama)."""
    logit_soft_cap: float | None = Field(default=None, gt=0)
    """Logits are bent to lie within plus and minus this (llama); none where left out."""
    sliding_window: int | None = Field(default=None, ge=1)
    """A token sees so many tokens back, itself among them (llama); all where left out."""
    dropout: float = Field(default=0.0, ge=0, le=0.99)
    """Share of the embedding's and each residual branch's channels that are dropped."""
    attention_dropout: float = Field(default=0.0, ge=0, le=0.99)
    """Share of the attention weights that are dropped."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target's probability that is spread over all tokens."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-partition of the output softmax, which keeps logits small; 1e-4 is customary."""
    experts: ExpertsConfig | None = None
    """A mixture of experts in place of each MLP (llama, gpt2)."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Whatever your own class wants to know."""

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def each_head(self) -> int:
        return self.head_width or self.width // self.heads

    @property
    def inner(self) -> int:
        return self.mlp_width or 4 * self.width

    @model_validator(mode="after")
    def _divides(self) -> "ModelConfig":
        if self.heads % self.kv:
            raise ValueError(f"kv_heads: got {self.kv_heads}, wants a divisor of heads {self.heads}; use {divisors(self.heads)}")
        if self.head_width is None and self.width % self.heads:
            wants = f"a divisor of width {self.width}, or head_width set"
            raise ValueError(f"heads: got {self.heads}, wants {wants}; use {divisors(self.width)}")
        if self.family == "llama" and self.head_width is not None and self.head_width % 2:
            raise ValueError(f"head_width: got {self.head_width}, wants an even one: rotation turns pairs; use {self.head_width + 1}")
        if self.family == "llama" and self.each_head % 2:
            wants = f"width / heads to be even (rotation turns pairs), got width {self.width}"
            raise ValueError(f"heads: got {self.heads}, wants {wants}; use {divisors(self.width // 2)}")
        return self

    @model_validator(mode="after")
    def _family_has_it(self) -> "ModelConfig":
        if self.family not in FAMILY_KEYS:
            if ":" not in self.family:
                raise ValueError(f"family: got {self.family!r}, wants {', '.join(FAMILY_KEYS)} or package.module:Class; name one of them")
            return self
        foreign = (set().union(*FAMILY_KEYS.values()) | {"options"}) - FAMILY_KEYS[self.family]
        for key in sorted(foreign):
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                raise ValueError(f"{key}: got {getattr(self, key)!r}, and family {self.family} has none; leave it out")
        return self


FAMILY_KEYS = {
    "llama": {"kv_heads", "head_width", "rope_theta", "qk_norm", "logit_soft_cap", "sliding_window", "experts"},
    "gpt2": {"positions", "experts"},
    "bert": {"positions"},
}
"""Keys of the model section that only some families have."""
