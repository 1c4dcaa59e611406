"""The sections of a config that a rank reads, apart from `data`, `tokenizer` and `model`. Each field's sentence is its documentation."""

import math
import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from manta.data.config import check_stages
from manta.data.errors import InvalidValueError, has_password, redact
from manta.data.source_config import Count, LocalPath, Location, Section
from manta.data.storage.location import absolute, local_path
from manta.trainer.config.divisors import divisors_text

Precision = Literal["fp32", "bf16", "bf16-autocast", "fp16", "fp8"]
AbsoluteLocation = Annotated[Location, AfterValidator(absolute)]


class RunSection(Section):
    dir: LocalPath = Field(examples=["runs/mine"])
    """The run directory: config, metrics, logs and checkpoints are stored in it."""
    start_from: AbsoluteLocation | None = Field(default=None, examples=["imported/gpt2"])
    """Initial weights of a new run: a run directory, a directory from `manta import`, or one checkpoint. Only its weights are read."""
    match_tokens: bool = False
    """For another tokenizer than start_from has: copy embedding rows by the text of their token, and initialize the rows of new tokens."""
    seed: int = Field(default=1, ge=0, lt=2**63)
    """Determines the initial weights and the order of samples."""

    @field_validator("dir", mode="before")
    @classmethod
    def _is_local(cls, value: object) -> object:
        if isinstance(value, str) and local_path(value) is None:
            remedy = f"Choose a local one; checkpoints may be there: checkpoint.directory={value}."
            raise ValueError(f"expected a directory of this machine, got {value}. {remedy}")
        return value


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
    """Adam's epsilon."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Weight decay of matrices, not of norms and biases; decoupled under adamw."""
    gradient_clipping: float = Field(default=1.0, gt=0)
    """Largest global gradient norm; larger gradients are scaled down to it."""


class ScheduleConfig(Section):
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate decays after warmup: cosine, linear or constant."""
    warmup_steps: Count = Field(default=0, ge=0)
    """Steps of linear warmup."""
    minimum_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step of the schedule, as a share of the peak."""
    steps: Count | None = Field(default=None, ge=1, examples=[1000])
    """Steps of warmup and decay; later steps stay at the minimum. Default: train.steps. A constant schedule has no end."""


class BatchConfig(Section):
    """One stage of a batch-size ramp."""

    from_tokens: int = Field(default=0, ge=0, le=2**60)
    """Start this stage at the first step after this many tokens; 0 for the first stage."""
    global_batch: int = Field(ge=1, le=2**20, examples=[32])
    """Samples per optimizer step, a multiple of train.micro_batch; train.global_batch in the last stage."""


class TrainConfig(Section):
    steps: Count = Field(ge=1, examples=[1000])
    """Optimizer steps of the whole run."""
    global_batch: int = Field(ge=1, le=2**20, examples=[256])
    """Samples, of data.sequence_length tokens, per optimizer step: data ranks x micro batch x gradient accumulation."""
    batch_ramp: tuple[BatchConfig, ...] = ()
    """Global batch by stage: gradient accumulation changes, the number of ranks does not; the schedule still counts steps."""
    micro_batch: Count = Field(ge=1, examples=[8])
    """Samples per data-parallel rank in one forward pass; lower it if memory is short."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes. none: nothing; selective: all but the results of matrix multiplications; full: each block."""
    compile: bool | None = None
    """Whether each block is compiled by torch.compile. Default: on GPUs if the layout supports it, never on CPUs."""

    @property
    def batches(self) -> tuple[int, ...]:
        """All global batches of the run, the final one last."""
        return tuple(stage.global_batch for stage in self.batch_ramp) or (self.global_batch,)

    @model_validator(mode="after")
    def _check_batches(self) -> "TrainConfig":
        if self.global_batch % self.micro_batch:
            expected, remedy = f"a divisor of global_batch ({self.global_batch})", f"Use {divisors_text(self.global_batch)}."
            raise InvalidValueError("micro_batch", expected, self.micro_batch, remedy, "global_batch")
        key = "batch_ramp"
        check_stages(key, [stage.from_tokens for stage in self.batch_ramp])
        for batch in self.batches:
            if batch % self.micro_batch:
                expected = f"global batches that are multiples of micro_batch ({self.micro_batch})"
                remedy = f"Change it, or use micro_batch {divisors_text(math.gcd(*self.batches))}."
                raise InvalidValueError(key, expected, batch, remedy, "micro_batch")
        if self.batches[-1] != self.global_batch:
            expected = f"train.global_batch ({self.global_batch}) in the last stage"
            raise InvalidValueError(key, expected, self.batches[-1], "Change it, or add a stage.", "global_batch")
        return self


class ParallelConfig(Section):
    """The layout of model and samples on the ranks. Combinations that are not in the parity table (docs/parity.md) are refused."""

    tensor: Count = Field(default=1, ge=1)
    """Tensor parallel size (Megatron-LM): each matrix, the heads and the vocabulary are split over this many ranks."""
    expert: Count = Field(default=1, ge=1)
    """Expert parallel size: the experts are split over this many ranks, which read different samples."""
    sequence: Count = Field(default=1, ge=1)
    """Sequence parallel size (Ulysses; not Megatron-LM's sequence parallelism): each sequence is split over this many ranks."""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: what is partitioned. 1: optimizer state and fp32 master weights; 2: gradients too; 3: weights too; 0: nothing."""
    offload: bool = False
    """Whether optimizer state and fp32 master weights are kept in CPU memory."""


class CheckpointConfig(Section):
    directory: AbsoluteLocation | None = Field(default=None, examples=["s3://bucket/mine"])
    """Directory, or URL in an object store, of the checkpoints. Default: run.dir/checkpoints."""
    every_steps: Count = Field(default=500, ge=1)
    """Steps between checkpoints; one is also written at the end and after a stop request."""
    every_minutes: float | None = Field(default=None, gt=0, examples=[30.0])
    """Longest time in minutes between checkpoints."""
    keep: Count = Field(default=2, ge=1)
    """Newest checkpoints to keep; two, so that one is left if the newest is damaged."""
    keep_best: Count = Field(default=0, ge=0)
    """Also keep this many checkpoints with the lowest validation loss, of those saved at an evaluated step."""
    keep_every: Count | None = Field(default=None, ge=1, examples=[10000])
    """Keep checkpoints of steps that are multiples of this forever."""
    asynchronous: bool = True
    """Write checkpoints in the background, from a copy of the rank's shard in CPU memory."""
    max_failed_saves: Count = Field(default=2, ge=0)
    """Consecutive saves that may fail, for lack of space for example, while training continues; one more stops the run."""
    verify: Literal["full", "sizes"] = "full"
    """What is checked before a run resumes from a checkpoint: the hash of every byte, or only the sizes of files."""


class GuardConfig(Section):
    replica_check_every_steps: Count = Field(default=100, ge=0)
    """Steps between checks that replicas of a weight are bitwise the same; also checked before each checkpoint. 0: never."""
    on_spike: Literal["report", "skip", "rollback", "stop"] = "report"
    """What follows a loss or gradient norm far above those before. report: an event that names the text (a value that is not finite stops
    the run); skip: also skip the update; rollback: go back to the last checkpoint, and skip the step's samples; stop: end the run."""
    spike_window: Count = Field(default=128, ge=2, le=1000)
    """Steps that a loss and a gradient norm are compared with; fewer than half of them are not enough to compare."""
    spike_deviations: float = Field(default=6.0, gt=0)
    """How many standard deviations above the window's mean a loss or gradient norm is a spike."""
    max_spikes: Count = Field(default=5, ge=1)
    """Spikes within spike_window steps that are skipped or rolled back; one more stops the run."""


class ValidationSet(Section):
    """More text to validate on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$", examples=["wiki"])
    """Its name in metrics: `eval/NAME/loss` and so on."""
    path: Location = Field(min_length=1, examples=["wiki/*.jsonl"])
    """Its documents, named like those of a source (data.sources). All of them are for validation."""
    text_field: str | None = Field(default=None, min_length=1)
    """Overrides data.text_field."""
    every_steps: Count | None = Field(default=None, ge=1)
    """Steps between its evaluations; unset: evaluate.every_steps. The last step is always evaluated."""
    samples: Count = Field(default=256, ge=1)
    """Sequences per evaluation, the same each time."""


class EvaluateConfig(Section):
    every_steps: Count = Field(default=250, ge=1)
    """Steps between evaluations; the last step is always evaluated."""
    samples: Count = Field(default=256, ge=1)
    """Validation sequences per evaluation: the first ones, the same each time."""
    sets: tuple[ValidationSet, ...] = Field(default=(), examples=["[{name: wiki, path: wiki/*.jsonl}]"])
    """Validation sets besides the documents that are held out."""

    @model_validator(mode="after")
    def _has_one_set_per_name(self) -> Self:
        names = [one.name for one in self.sets]
        for name in names:
            if name in {"loss", "bits_per_byte"} or names.count(name) > 1:
                raise ValueError(
                    f"sets: expected a different name for each set, other than loss and bits_per_byte, got {name!r}. Rename it."
                )
        return self


class WandbConfig(Section):
    """Weights & Biases (`pip install 'manta[wandb]'`). The key is that of `wandb login`, or WANDB_API_KEY in the environment."""

    project: str = Field(min_length=1, max_length=128, examples=["mine"])
    """The project of Weights & Biases."""
    entity: str | None = Field(default=None, min_length=1)
    """The user or team that the project belongs to; by default your own."""


class MlflowConfig(Section):
    """MLflow (`pip install 'manta[mlflow]'`). User and password are MLFLOW_TRACKING_USERNAME and _PASSWORD in the environment."""

    uri: AbsoluteLocation = Field(min_length=1, examples=["http://mlflow:5000"])
    """The tracking server, or a directory."""
    experiment: str = Field(default="manta", min_length=1)
    """The experiment of MLflow."""


class AlertConfig(Section):
    """What to do at events of a run: run a command, send a POST request, or both."""

    events: tuple[Literal["failure", "restart", "spike", "end"], ...] = ("failure", "restart", "spike", "end")
    """failure: of a rank or node; restart: of the ranks; spike: of the loss or the gradients; end: of the run."""
    command: tuple[str, ...] = ()
    """A program and its arguments. It reads the alert from standard input, as JSON."""
    url: str | None = None
    """An http or https URL that the alert is sent to, as JSON with the key `text`: a webhook of Slack, for example."""
    url_variable: str | None = Field(default=None, min_length=1, examples=["SLACK_WEBHOOK"])
    """The environment variable with that URL, if the URL is a secret."""

    @model_validator(mode="after")
    def _has_one_target(self) -> Self:
        if self.url is not None and (has_password(self.url) or not re.fullmatch(r"https?://[!-~]+", self.url)):
            raise ValueError(
                f"url: expected an http or https URL without a password, got {redact(self.url)}. Use url_variable for a secret one."
            )
        if self.url and self.url_variable:
            raise ValueError("url: expected url or url_variable, got both. Remove one.")
        if not (self.command or self.url or self.url_variable):
            raise ValueError("expected a command, a url or a url_variable, got none. Add one.")
        return self


class TrackConfig(Section):
    every_steps: Count = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl."""
    sources_every_steps: Count = Field(default=100, ge=0)
    """Steps between lines that also have the training loss of each source. 0: never."""
    health_every_steps: Count = Field(default=100, ge=0)
    """Steps between lines that also have the model's health: gradients, weights and updates, activations and attention logits. 0: never."""
    watts: float | None = Field(default=None, gt=0, examples=[95.0])
    """Power in watts that a rank's device takes while it trains, to estimate energy where it cannot be measured."""
    grid_intensity: float | None = Field(default=None, ge=0, examples=[380.0])
    """Grams of CO2 per kWh of your electricity; unset: no CO2 is reported."""
    texts: Count = Field(default=0, ge=0, le=20)
    """Texts to generate with the newest checkpoint when the run is done, for its report and trackers. model.family: llama or gpt2."""
    tensorboard: bool = True
    """Write what TensorBoard reads to run.dir/tensorboard."""
    wandb: WandbConfig | None = None
    """Weights & Biases."""
    mlflow: MlflowConfig | None = None
    """MLflow."""
    prometheus: int | None = Field(default=None, ge=1, le=65535, examples=[9400])
    """Serve the newest metrics to Prometheus at this port of 127.0.0.1."""
    on_event: tuple[AlertConfig, ...] = ()
    """Alerts."""
