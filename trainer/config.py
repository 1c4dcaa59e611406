"""What a run is: every section that a rank reads. `launch` adds where the ranks are placed.

Importing this costs no torch: a bad config is told in tenths of a second. Each field's line of prose is its help.
"""

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from manta.data.config import DataConfig, TokenizerConfig

Precision = Literal["fp32", "bf16"]
FREE = (
    *("run.dir", "data.directory", "data.workers", "model.preset", "train.steps", "train.micro_batch"),
    *("parallel.", "checkpoint.", "evaluate.", "track.", "cluster."),
)
"""Keys, and sections, that may change when a run is resumed (train.steps upwards only)."""


class Section(BaseModel):
    """One section of a config: frozen, complete, no surprises."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class RunSection(Section):
    dir: Path = Field(examples=["runs/mine"])
    """Where everything of this run lies."""

    @field_validator("dir")
    @classmethod
    def _can_be_a_path(cls, value: Path) -> Path:
        if "\0" in str(value):
            raise ValueError(f"got {str(value)!r}, wants a path; leave out the NUL")
        return value

    seed: int = Field(default=1, ge=0, lt=2**63)
    """Fixes the initial weights and the order of samples."""


class ModelConfig(Section):
    """A decoder in the Llama manner."""

    preset: str | None = None
    """A named model to start from; every other key of this section overrides it."""
    layers: int = Field(ge=1, examples=[12])
    """Number of blocks."""
    width: int = Field(ge=1, examples=[768])
    """Width of the residual stream."""
    heads: int = Field(ge=1, examples=[12])
    """Number of query heads; divides width."""
    kv_heads: int = Field(ge=1, examples=[12])
    """Number of key and value heads (grouped-query attention); divides heads."""
    mlp_width: int = Field(ge=1, examples=[2048])
    """Inner width of the SwiGLU block."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary position embedding."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Added to the mean square under RMSNorm's root."""
    tied_head: bool = True
    """Whether the output head shares the embedding's weight."""

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @model_validator(mode="after")
    def _divides(self) -> "ModelConfig":
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: got {self.kv_heads}, wants a divisor of heads {self.heads}; use {_divisors(self.heads)}")
        if self.width % self.heads or self.head_width % 2:
            wants = f"width / heads to be even and whole, got width {self.width}"
            raise ValueError(f"heads: got {self.heads}, wants {wants}; use {_divisors(self.width // 2)}")
        return self


class OptimizerConfig(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd (with momentum beta1)."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate, reached after warmup."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay, on matrices only: not on norms. Decoupled under adamw."""
    gradient_clipping: float = Field(default=1.0, gt=0)
    """Largest global gradient norm; a larger gradient is scaled down to it."""


class ScheduleConfig(Section):
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after warmup, to the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warmup."""
    minimum_ratio: float = Field(default=0.1, ge=0, le=1)
    """What is left of the learning rate at the last step."""


class TrainConfig(Section):
    steps: int = Field(ge=1, examples=[1000])
    """Optimizer steps of the whole run."""
    global_batch: int = Field(ge=1, le=2**20, examples=[256])
    """Sequences an optimizer step, over all ranks: data size x micro batch x accumulation."""
    micro_batch: int = Field(ge=1, examples=[8])
    """Sequences a rank takes at once; lower it where memory is short."""

    @model_validator(mode="after")
    def _divides(self) -> "TrainConfig":
        if self.global_batch % self.micro_batch:
            divisors = _divisors(self.global_batch)
            raise ValueError(f"micro_batch: got {self.micro_batch}, wants a divisor of global_batch {self.global_batch}; use {divisors}")
        return self


class ParallelConfig(Section):
    """Only what a parity test has proven is accepted."""

    tensor: Literal[1] = 1
    """Ranks that share each matrix; only 1 is proven in this version."""
    expert: Literal[1] = 1
    """Ranks that share the experts; only 1 is proven in this version."""
    sequence: Literal[1] = 1
    """Ranks that share each sequence; only 1 is proven in this version."""
    zero: Literal[1] = 1
    """ZeRO stage; only 1 (optimizer state cut over the data ranks) is proven in this version."""


class CheckpointConfig(Section):
    every_steps: int = Field(default=500, ge=1)
    """Steps between checkpoints; one is always written at the end and when told to leave."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept; two, so that one stands behind should the newest be damaged."""


class EvaluateConfig(Section):
    every_steps: int = Field(default=250, ge=1)
    """Steps between evaluations; one is always made at the end."""
    samples: int = Field(default=256, ge=1)
    """Validation sequences: the first ones, the same each time."""


class TrackConfig(Section):
    every_steps: int = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl."""


class TrainingConfig(Section):
    """All that a rank needs to know."""

    run: RunSection
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    track: TrackConfig = TrackConfig()
    precision: Precision = "bf16"
    """fp32, or bf16 with fp32 master weights and optimizer state."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> "TrainingConfig":
        if self.schedule.warmup_steps > self.train.steps:
            wants = f"at most train.steps {self.train.steps}"
            raise ValueError(f"schedule.warmup_steps: got {self.schedule.warmup_steps}, wants {wants}; shorten the warmup or train longer")
        return self

    def identity(self) -> dict[str, object]:
        """By dotted key, all that samples and mathematics depend on: none of it may change when a run is resumed."""
        flat: dict[str, object] = {"precision": self.precision}
        for name, section in self.model_dump(mode="json").items():
            if isinstance(section, dict):
                flat |= {f"{name}.{key}": value for key, value in section.items()}
        return {key: value for key, value in flat.items() if not key.startswith(FREE)}


def _divisors(n: int) -> str:
    """In words: `1, 2, 4 or 8`; of many the smallest and the largest."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    divisors = sorted({*small, *(n // d for d in small)})
    if len(divisors) > 8:
        divisors = divisors[:4] + divisors[-4:]
    return " or ".join(filter(None, [", ".join(map(str, divisors[:-1])), str(divisors[-1])]))
