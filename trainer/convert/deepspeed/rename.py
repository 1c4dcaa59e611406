"""A DeepSpeed checkpoint under our names: unchanged for one of our models or the user's own, mapped for a model of transformers.

Optimizer state is mapped like the weights: a mapping moves elements, and changes none.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from manta.data.errors import InputError
from manta.trainer.architectures.architecture import Architecture
from manta.trainer.architectures.families import architecture_for, map_tensors
from manta.trainer.architectures.tensor_map import IDENTITY, TensorMapping, hf_shapes, padded, substitute
from manta.trainer.checkpoint.manifest import Progress, first_difference
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.config.training import TrainingConfig
from manta.trainer.convert.deepspeed.load import MASTER, DeepSpeedCheckpoint, States
from manta.trainer.model.build import build_model
from manta.trainer.model.transformer import Transformer
from manta.trainer.optim.optimizers import STATE_KEYS
from manta.trainer.pretrained.weights import model_tensors

Names = Literal["manta", "huggingface"]
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of another engine's wrapper, and of torch.compile
FUSED_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
OPTIMIZERS = {"adamw": STATE_KEYS[torch.optim.AdamW], "sgd": STATE_KEYS[torch.optim.SGD]}


def logical_state(
    source: DeepSpeedCheckpoint, config: TrainingConfig, *, vocabulary: int, code: Path, names: Names | None
) -> dict[str, TensorViews]:
    """Return the tensors of our checkpoint. vocabulary: the tokenizer's size. names: by default those that fit more tensors.

    Raises InputError with the first tensor that is missing, surplus or of another shape.
    """
    with torch.device("meta"):
        model = build_model(config.model, vocabulary=vocabulary, sequence_length=config.data.sequence_length, code=code)
    return _Renamer(source, config, model, config.model.vocabulary or vocabulary, names).state()


def progress(source: DeepSpeedCheckpoint, config: TrainingConfig) -> Progress:
    """Return the position of a run of this config that resumes from the checkpoint."""
    return Progress(
        step=source.step,
        samples_consumed=config.timeline().first_sample(source.step),
        optimizer_steps=source.optimizer_steps,
        loss_scaler=source.loss_scaler if config.precision == "fp16" else None,
    )


class _Renamer:
    def __init__(
        self, source: DeepSpeedCheckpoint, config: TrainingConfig, model: Transformer, vocabulary: int, names: Names | None
    ) -> None:
        self._source, self._config = source, config
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
        self._trained = {name for name, _ in model.named_parameters()}
        self._parameters = {_unwrapped(name): states for name, states in source.parameters.items()}
        self._buffers = {_unwrapped(name): tensor for name, tensor in source.buffers.items()}
        self._tied = {_unwrapped(name): _unwrapped(original) for name, original in source.tied.items()}
        self._mappings, self._vocabulary = self._choose_names(names, vocabulary)

    def state(self) -> dict[str, TensorViews]:
        """Holds no more than one tensor besides those that it returns."""
        self._check_shapes()
        self._check_tied()
        for problem in self._optimizer_problems():
            raise InputError(f"{self._source.folder}: {problem} Set optimizer.name to the one that was used.")
        keys = (MASTER, *OPTIMIZERS[self._config.optimizer.name])
        state: dict[str, TensorViews] = {}
        for mapping in self._mappings:
            for key in keys if self._trained.issuperset(mapping.ours) else (MASTER,):
                for name, tensor in mapping.from_hf(lambda name, key=key: self._read(name, key)).items():
                    shape = self._shapes[name]
                    fits = tensor.shape == shape and tensor.dtype == torch.float32 and tensor.is_contiguous()
                    state[f"{key}/{name}"] = TensorViews.from_whole(tensor if fits else padded(tensor, shape))
        return state

    def _choose_names(self, names: Names | None, vocabulary: int) -> tuple[list[TensorMapping], int]:
        """Return the mapping from the checkpoint's names, and how many rows of its vocabulary are not padding."""
        config = self._config.model
        ours = [TensorMapping((name,), (name,), IDENTITY) for name in self._shapes]
        rows = max((shape[0] for shape in self._shapes.values()), default=0)  # under our names padding is included
        if names == "manta" or (names is None and ":" in config.family):
            return ours, rows
        try:
            architecture = architecture_for(config)
        except InputError:
            if names is None:
                return ours, rows
            raise
        hf = map_tensors(architecture, config, self._shapes)
        as_in_files = _as_in_files(self._parameters, architecture)
        if names == "huggingface" or _matching(as_in_files, hf) > _matching(self._parameters, ours):
            self._parameters = as_in_files
            return hf, vocabulary
        return ours, rows

    def _check_shapes(self) -> None:
        expected = hf_shapes(self._mappings, self._shapes, self._vocabulary)
        found = {name: tuple(states[MASTER].shape) for name, states in self._parameters.items()}
        found |= {name: tuple(tensor.shape) for name, tensor in self._buffers.items() if name in expected}
        found |= {name: found[original] for name, original in self._tied.items() if name in expected and original in found}
        originals = {self._tied.get(name, name) for name in expected}
        found = {name: shape for name, shape in found.items() if name in expected or name not in originals}
        if found != expected:
            raise InputError(f"{self._source.folder}: {first_difference(expected, found)}. Set model to the one that was trained.")

    def _check_tied(self) -> None:
        """Raises InputError if two of our weights are one in the checkpoint: training would separate them."""
        users: dict[str, TensorMapping] = {}
        for mapping in self._mappings:
            for name in mapping.hf:
                original = self._tied.get(name, name)
                if users.setdefault(original, mapping) is not mapping:
                    problem = f"expected a separate weight, got one tied to {original}. Set model.tied_head=true."
                    raise InputError(f"{self._source.folder}: {name}: {problem}")

    def _optimizer_problems(self) -> Iterator[str]:
        """Yield states that only one of the two optimizers has. Before the first update there may be none yet."""
        optimizer = self._config.optimizer
        expected = {MASTER, *OPTIMIZERS[optimizer.name]}
        has_none_yet = self._source.updates == 0 if optimizer.name == "sgd" else self._source.optimizer_steps == 0
        may_lack_all = has_none_yet or (optimizer.name == "sgd" and optimizer.beta1 == 0)
        for name, states in sorted(self._parameters.items()):
            if surplus := sorted(states.keys() - expected):
                yield f"{name}: expected the state of {optimizer.name}, got {surplus[0]}."
            missing = sorted(expected - states.keys())
            if missing and not (may_lack_all and len(missing) == len(expected) - 1):
                yield f"{name}: expected {missing[0]} of {optimizer.name}, got none."

    def _read(self, name: str, key: str) -> Tensor:
        original = self._tied.get(name, name)
        if original not in self._parameters:
            return self._buffers[original]
        states = self._parameters[original]
        return states[key] if key in states else torch.zeros_like(states[MASTER])


def _unwrapped(name: str) -> str:
    return WRAPPERS.sub("", name)


def _matching(parameters: Mapping[str, States], mappings: list[TensorMapping]) -> int:
    return len(parameters.keys() & {name for mapping in mappings for name in mapping.hf})


def _as_in_files(parameters: Mapping[str, States], architecture: Architecture) -> dict[str, States]:
    """Rename parameters of a model in memory as in its files. transformers 5 fuses all experts of a block into two weights."""
    split: dict[str, States] = {}
    for name, states in parameters.items():
        if (fused := FUSED_EXPERTS.fullmatch(name)) is None:
            split[name] = states
            continue
        parts = fused[2].replace("gate_up_proj", "gate_proj up_proj").split()
        for key, whole in states.items():
            for part, weights in zip(parts, whole.chunk(len(parts), dim=1), strict=True):
                for expert, weight in enumerate(weights):
                    split.setdefault(f"{fused[1]}.{expert}.{part}.weight", {})[key] = weight
    return {substitute(name, architecture.memory_names): states for name, states in split.items()}


def differences(source: DeepSpeedCheckpoint, config: TrainingConfig) -> list[str]:
    """Return settings that affect losses and differ from this config's; not the learning rate, which has a schedule."""
    optimizer, pairs = config.optimizer, dict[str, tuple[object, object]]()
    for name, group in source.settings.items():
        beta1, beta2 = group.get("betas", (group.get("momentum", optimizer.beta1), optimizer.beta2))
        pairs["optimizer.beta1"], pairs["optimizer.beta2"] = (beta1, optimizer.beta1), (beta2, optimizer.beta2)
        pairs["optimizer.epsilon"] = (group.get("eps", optimizer.epsilon), optimizer.epsilon)
        decay = optimizer.weight_decay if source.parameters[name][MASTER].ndim > 1 else 0.0
        if (was := group.get("weight_decay", 0.0)) != decay and not any(" of " in key for key in pairs):
            pairs[f"optimizer.weight_decay of {name}"] = (was, decay)  # one parameter is enough
    pairs["optimizer.gradient_clipping"] = (source.clipping, optimizer.gradient_clipping)
    pairs["samples read"] = (source.samples, config.timeline().first_sample(source.step))
    return [f"{key}: DeepSpeed had {was}, this config has {now}" for key, (was, now) in pairs.items() if was != now]
