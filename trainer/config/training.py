"""What a run is: every section that a rank reads. `launch` adds where the ranks are placed.

Importing this costs no torch: a bad config is told in tenths of a second. Each field's line of prose is its help.
"""

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from manta.data.config import DataConfig, TokenizerConfig, WholeNumber, check_stages
from manta.data.config_history import identifying_keys
from manta.data.sampling.timeline import Timeline
from manta.data.sources.config import Section
from manta.data.storage.location import absolute
from manta.trainer.config.model import FAMILY_KEYS, ModelConfig
from manta.trainer.config.supported import divisors, refusal

Precision = Literal["fp32", "bf16", "bf16-autocast", "fp16", "fp8"]
FREE = (
    *(
        "run.dir",
        "data.directory",
        "data.workers",
        "data.cache",
        "data.ray_address",
        "data.skip",
        "model.preset",
        "train.steps",
        "train.micro_batch",
        "train.activation_checkpointing",
        "train.compile",
    ),
    *("parallel.", "checkpoint.", "guard.", "evaluate.", "track.", "cluster."),
)
"""Keys, and sections, that may change when a run is resumed: train.steps upwards only, data.skip of what was not read yet."""


class RunSection(Section):
    dir: Path = Field(examples=["runs/mine"])
    """Where everything of this run lies."""

    @field_validator("dir")
    @classmethod
    def _can_be_a_path(cls, value: Path) -> Path:
        if "\0" in str(value):
            raise ValueError(f"got {str(value)!r}, wants a path; leave out the NUL")
        return value

    start_from: str | None = Field(default=None, examples=["imported/gpt2"])
    """Whose weights a new run begins with: a run's directory, what `manta import` made, or one checkpoint. All else begins anew."""

    @field_validator("start_from")
    @classmethod
    def _from_wherever_we_are(cls, value: str | None) -> str | None:
        return value if value is None else absolute(value)

    match_tokens: bool = False
    """Whether rows of those weights go by what a token is, where this vocabulary has grown, or another order. New ones begin anew."""
    seed: int = Field(default=1, ge=0, lt=2**63)
    """Fixes the initial weights and the order of samples."""


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


class BatchConfig(Section):
    """From when on a step has how many samples."""

    from_tokens: WholeNumber = Field(default=0, ge=0)
    """Tokens read before this stage, which starts at the next step; 0 for the first stage."""
    global_batch: int = Field(ge=1, le=2**20, examples=[32])
    """A multiple of train.micro_batch; in the last stage train.global_batch."""


class TrainConfig(Section):
    steps: int = Field(ge=1, examples=[1000])
    """Optimizer steps of the whole run."""
    global_batch: int = Field(ge=1, le=2**20, examples=[256])
    """Samples, of data.sequence_length tokens, an optimizer step: data size x micro batch x accumulation."""
    batch_ramp: tuple[BatchConfig, ...] = ()
    """Other global batches to begin with, in stages; ranks stay as many, accumulation changes. The learning rate goes on by steps."""
    micro_batch: int = Field(ge=1, examples=[8])
    """Samples a rank takes at once; lower it where memory is short."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes instead of keeping it. selective: all but matrix products; full: every block."""
    compile: bool | None = None
    """Whether each block is compiled by torch.compile; where left out, on GPUs yes if the layout allows it, on CPUs no."""

    @property
    def batches(self) -> tuple[int, ...]:
        """Every global batch that a step may have, the last one of the whole run at the end."""
        return tuple(stage.global_batch for stage in self.batch_ramp) or (self.global_batch,)

    @model_validator(mode="after")
    def _divides(self) -> "TrainConfig":
        if self.global_batch % self.micro_batch:
            wants = f"a divisor of global_batch {self.global_batch}"
            raise ValueError(f"micro_batch: got {self.micro_batch}, wants {wants}; use {divisors(self.global_batch)}")
        return self

    @model_validator(mode="after")
    def _ramp_leads_to_it(self) -> "TrainConfig":
        check_stages("batch_ramp", [stage.from_tokens for stage in self.batch_ramp])
        for batch in self.batches:
            if batch % self.micro_batch:
                fitting = divisors(math.gcd(*self.batches))
                wants = f"a multiple of micro_batch {self.micro_batch}"
                raise ValueError(f"batch_ramp: got global_batch {batch}, wants {wants}; change it, or use micro_batch {fitting}")
        if self.batches[-1] != self.global_batch:
            wants = f"train.global_batch {self.global_batch}"
            raise ValueError(f"batch_ramp: got global_batch {self.batches[-1]} in its last stage, wants {wants}; add a stage, or change it")
        return self


class ParallelConfig(Section):
    """How a model and its samples lie on the ranks. What is not on the parity table (docs/parity.md) is refused."""

    tensor: int = Field(default=1, ge=1)
    """Ranks that share each matrix, heads and the vocabulary among them (Megatron-LM)."""
    expert: int = Field(default=1, ge=1)
    """Ranks that share the experts of a mixture; they share no samples."""
    sequence: int = Field(default=1, ge=1)
    """Ranks that share each sequence (Ulysses)."""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage, what lies cut over the data ranks. 1: optimizer state and masters; 2: gradients too; 3: weights too; 0: nothing."""
    offload: bool = False
    """Whether optimizer state and masters lie in CPU memory."""


class CheckpointConfig(Section):
    directory: str | None = Field(default=None, examples=["s3://bucket/mine"])
    """Where checkpoints lie, a directory or the URL of an object store; run.dir/checkpoints where left out."""
    every_steps: int = Field(default=500, ge=1)
    """Steps between checkpoints; one is always written at the end and when told to leave."""
    every_minutes: float | None = Field(default=None, gt=0, examples=[30.0])
    """Minutes after which one is written in any case, counted from the last."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept; two, so that one stands behind should the newest be damaged."""
    keep_best: int = Field(default=0, ge=0)
    """Checkpoints kept beside them, of the lowest validation loss; only of steps that were evaluated."""
    keep_every: int | None = Field(default=None, ge=1, examples=[10000])
    """Checkpoints of steps that are multiples of this are kept for ever."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written, from a copy in CPU memory of what the rank writes."""
    max_failed_saves: int = Field(default=2, ge=0)
    """Consecutive saves that may fail, for lack of space for example, while training continues; one more stops the run."""
    verify: Literal["full", "sizes"] = "full"
    """What is checked before a checkpoint is gone on from: every byte by its hash, or the sizes of files alone."""

    @field_validator("directory")
    @classmethod
    def _from_wherever_we_are(cls, value: str | None) -> str | None:
        return value if value is None else absolute(value)


class GuardConfig(Section):
    replica_check_every_steps: int = Field(default=100, ge=0)
    """Steps between checks that replicas of a weight are bitwise the same; also checked before each checkpoint. 0: never."""


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
    guard: GuardConfig = GuardConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    track: TrackConfig = TrackConfig()
    precision: Precision = "bf16"
    """fp32; bf16, or fp16 with dynamic loss scaling, both with fp32 masters and optimizer state; bf16-autocast; fp8 (Hopper on)."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> "TrainingConfig":
        if self.schedule.warmup_steps > self.train.steps:
            wants = f"at most train.steps {self.train.steps}"
            raise ValueError(f"schedule.warmup_steps: got {self.schedule.warmup_steps}, wants {wants}; shorten the warmup or train longer")
        return self

    @model_validator(mode="after")
    def _objective_suits(self) -> "TrainingConfig":
        wants = "masked" if self.model.family == "bert" else "causal"
        if self.model.family in FAMILY_KEYS and self.data.objective != wants:
            raise ValueError(f"data.objective: got {self.data.objective!r}, wants {wants!r} for model.family {self.model.family}; set it")
        return self

    @model_validator(mode="after")
    def _positions_suffice(self) -> "TrainingConfig":
        if self.model.positions is not None and self.model.positions < self.data.sequence_length:
            wants = f"at least data.sequence_length {self.data.sequence_length}"
            raise ValueError(f"model.positions: got {self.model.positions}, wants {wants}; shorten the sequences or raise it")
        return self

    @model_validator(mode="after")
    def _curriculum_leads_to_it(self) -> "TrainingConfig":
        lengths = [stage.sequence_length for stage in self.data.curriculum]
        if lengths and lengths[-1] != self.data.sequence_length:
            wants = f"data.sequence_length {self.data.sequence_length}"
            raise ValueError(
                f"data.curriculum: got sequence_length {lengths[-1]} in its last stage, wants {wants}; add a stage, or change it"
            )
        return self

    @model_validator(mode="after")
    def _is_proven(self) -> "TrainingConfig":
        reason = refusal(
            self.model,
            self.parallel,
            self.precision,
            sequence_length=self.data.sequence_length,
            curriculum=[stage.sequence_length for stage in self.data.curriculum],
            compiled=self.train.compile is True,
            recompute=self.train.activation_checkpointing,
        )
        if reason is not None:
            raise ValueError(reason)
        return self

    def timeline(self) -> Timeline:
        """Which samples each step reads, and in sequences of which length."""
        return Timeline(
            sequence_length=self.data.sequence_length,
            global_batch=self.train.global_batch,
            ramp=[(stage.from_tokens, stage.global_batch) for stage in self.train.batch_ramp],
            curriculum=[(stage.from_tokens, stage.sequence_length) for stage in self.data.curriculum],
        )

    def identity(self) -> dict[str, object]:
        """Return, by dotted key, everything that samples and mathematics depend on: none of it may change when a run is resumed.

        A key that was added after version 1 is included only if it differs from its default.
        """
        flat: dict[str, object] = {}
        for name, section in identifying_keys(self).items():
            if f"{name}." not in FREE:
                flat |= {f"{name}.{key}": value for key, value in section.items()} if isinstance(section, dict) else {name: section}
        return {key: value for key, value in flat.items() if key not in FREE}
