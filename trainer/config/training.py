"""The config of a run as a rank reads it: all sections but `cluster`, and the checks across sections.

Importing this imports no torch, so config errors are reported within tenths of a second.
"""

from collections.abc import Sequence
from typing import Self

from pydantic import model_validator

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.config_history import identifying_keys
from manta.data.errors import InvalidValueError
from manta.data.sampling.step_samples import Timeline
from manta.data.source_config import Section, SourceConfig
from manta.trainer.config import sections
from manta.trainer.config.model import FAMILY_KEYS, ModelConfig
from manta.trainer.config.supported import unsupported

FREE = (
    *("run.dir", "data.directory", "data.workers", "data.cache", "data.ray_address", "data.skip", "model.preset"),
    *("train.steps", "schedule.steps", "train.micro_batch", "train.activation_checkpointing", "train.compile"),
    *("parallel.", "checkpoint.", "guard.", "evaluate.", "track.", "cluster."),
)
"""Keys and sections that may change when a run resumes. train.steps may only grow; data.skip may change only for samples not read yet."""


class TrainingConfig(Section):
    run: sections.RunSection
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig
    optimizer: sections.OptimizerConfig = sections.OptimizerConfig()
    schedule: sections.ScheduleConfig = sections.ScheduleConfig()
    train: sections.TrainConfig
    parallel: sections.ParallelConfig = sections.ParallelConfig()
    checkpoint: sections.CheckpointConfig = sections.CheckpointConfig()
    guard: sections.GuardConfig = sections.GuardConfig()
    evaluate: sections.EvaluateConfig = sections.EvaluateConfig()
    track: sections.TrackConfig = sections.TrackConfig()
    precision: sections.Precision = "bf16"
    """fp32, bf16, bf16-autocast, fp16 (dynamic loss scaling) or fp8 (Hopper). Master weights and optimizer state are always fp32."""

    @model_validator(mode="after")
    def _check_across_sections(self) -> "TrainingConfig":
        length, positions = self.data.sequence_length, self.model.positions
        key, steps = ("schedule.steps", self.schedule.steps) if self.schedule.steps else ("train.steps", self.train.steps)
        if (warmup := self.schedule.warmup_steps) > steps:
            remedy = "Shorten the warmup or train longer." if key == "train.steps" else f"Shorten the warmup or raise {key}."
            raise InvalidValueError("schedule.warmup_steps", f"at most {key} ({steps})", warmup, remedy, key)
        objective = "masked" if self.model.family == "bert" else "causal"
        if self.model.family in FAMILY_KEYS and self.data.objective != objective:
            expected, remedy = f"{objective} for model.family {self.model.family}", f"Set data.objective={objective}."
            raise InvalidValueError("data.objective", expected, self.data.objective, remedy, "model.family", "model.preset")
        if positions is not None and positions < length:
            expected, remedy = f"at least data.sequence_length ({length})", "Raise it or shorten the sequences."
            raise InvalidValueError("model.positions", expected, positions, remedy, "data.sequence_length")
        lengths = [stage.sequence_length for stage in self.data.curriculum]
        if lengths and lengths[-1] != length:
            expected, remedy = f"data.sequence_length ({length}) in the last stage", "Change it, or add a stage."
            raise InvalidValueError("data.curriculum", expected, lengths[-1], remedy, "data.sequence_length")
        if self.data.live and self.guard.on_spike == "rollback":
            expected, remedy = "report, skip or stop with data.live, which cannot skip samples", "Use one of these."
            raise InvalidValueError("guard.on_spike", expected, "rollback", remedy, "data.live")
        if self.track.texts and self.model.family == "bert":  # whether a model of the user's generates text shows when it is loaded
            remedy = "Omit track.texts."
            raise InvalidValueError("model.family", "llama or gpt2 with track.texts", "bert", remedy, "track.texts", "model.preset")
        for error in unsupported(self.model, self.parallel, self.precision, self.train, lengths=[length, *lengths]):
            raise error
        return self

    def skip_also(self, samples: Sequence[tuple[int, int]]) -> Self:
        """Return this config with more samples excluded."""
        return self.model_copy(update={"data": self.data.skip_also(samples)})

    def timeline(self) -> Timeline:
        """Return which samples each step reads, and their sequence length."""
        return Timeline(
            sequence_length=self.data.sequence_length,
            global_batch=self.train.global_batch,
            ramp=[(stage.from_tokens, stage.global_batch) for stage in self.train.batch_ramp],
            curriculum=[(stage.from_tokens, stage.sequence_length) for stage in self.data.curriculum],
        )

    def validation_set(self, one: sections.ValidationSet) -> DataConfig:
        """Return the config of a corpus that has this set as its only source, in the form that the run reads."""
        source = SourceConfig(path=one.path, name=one.name, text_field=one.text_field)
        alone: dict[str, object] = {
            "sources": (source,),
            "mixture": (),
            "skip": (),
            "validation": 0.0,
            "live": False,
            "shuffle_shards": None,
        }
        return self.data.model_copy(update=alone)

    def identity(self) -> dict[str, object]:
        """Return, by dotted key, everything that samples and mathematics depend on: none of it may change when a run is resumed.

        A key that was added after version 1 is included only if it differs from its default.
        """
        flat: dict[str, object] = {}
        for name, section in identifying_keys(self).items():
            if f"{name}." not in FREE:
                flat |= {f"{name}.{key}": value for key, value in section.items()} if isinstance(section, dict) else {name: section}
        return {key: value for key, value in flat.items() if key not in FREE}
