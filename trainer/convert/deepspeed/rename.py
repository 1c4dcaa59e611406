"""A DeepSpeed checkpoint under our names: unchanged for one of our models or the user's own, mapped for a model of transformers.

Optimizer state is mapped like the weights: a mapping moves elements, and changes none.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from manta.data.errors import InputError
from manta.trainer.architectures.architecture import TRANSFORMS, Architecture, TensorMapping, hf_shapes, map_tensors, padded, substitute
from manta.trainer.architectures.config_json import architecture_for
from manta.trainer.checkpoint.manifest import Progress, first_difference
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.config.model import ModelConfig
from manta.trainer.config.sections import OptimizerConfig
from manta.trainer.config.training import TrainingConfig
from manta.trainer.convert.deepspeed.load import MASTER, DeepSpeedCheckpoint, States, other_content
from manta.trainer.model.build import build_model
from manta.trainer.optim.optimizers import STATE_KEYS
from manta.trainer.pretrained.load import model_tensors

NAMES = ("manta", "huggingface")
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of another engine's wrapper, and of torch.compile
FUSED_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
OPTIMIZERS = {"adamw": STATE_KEYS[torch.optim.AdamW], "sgd": STATE_KEYS[torch.optim.SGD]}


def logical_state(
    source: DeepSpeedCheckpoint, config: TrainingConfig, *, vocabulary: int, code: Path, names: str | None
) -> dict[str, TensorViews]:
    """Return the tensors of our checkpoint. vocabulary: the tokenizer's size. names: one of NAMES; by default those that fit more tensors.

    Holds no more than one tensor besides. Raises InputError with the first tensor that is missing, surplus or of another shape.
    """
    with other_content(source.folder):
        return _logical_state(source, config, vocabulary=vocabulary, code=code, names=names)


def _logical_state(
    source: DeepSpeedCheckpoint, config: TrainingConfig, *, vocabulary: int, code: Path, names: str | None
) -> dict[str, TensorViews]:
    with torch.device("meta"):
        model = build_model(config.model, vocabulary=vocabulary, sequence_length=config.data.sequence_length, code=code)
    tensors, trained = model_tensors(model), {name for name, _ in model.named_parameters()}
    source = replace(
        source,
        parameters={_unwrapped(name): states for name, states in source.parameters.items()},
        buffers={_unwrapped(name): tensor for name, tensor in source.buffers.items()},
        tied={_unwrapped(name): _unwrapped(original) for name, original in source.tied.items()},
    )
    architecture = _architecture(source, config.model, tensors, names)
    if architecture is None:
        mappings, rows = [TensorMapping((name,), (name,), TRANSFORMS["identity"]) for name in tensors], None  # padding is included
    else:
        mappings, rows = map_tensors(architecture, config.model, tensors), config.model.vocabulary or vocabulary
        source = replace(source, parameters=_as_in_files(source.parameters, architecture))
    _check_shapes(source, hf_shapes(mappings, tensors, rows))
    _check_tied(source, mappings)
    _check_optimizer(source, config.optimizer)
    keys = (MASTER, *OPTIMIZERS[config.optimizer.name])
    state: dict[str, TensorViews] = {}
    for mapping in mappings:
        for key in keys if trained.issuperset(mapping.ours) else (MASTER,):
            for name, tensor in mapping.from_hf(partial(_read, source, key)).items():
                shape = tensors[name].shape
                fits = tensor.shape == shape and tensor.dtype == torch.float32 and tensor.is_contiguous()
                state[f"{key}/{name}"] = TensorViews.from_whole(tensor if fits else padded(tensor, shape))
    return state


def progress(source: DeepSpeedCheckpoint, config: TrainingConfig) -> Progress:
    """Return the position of a run of this config that resumes from the checkpoint."""
    return Progress(
        step=source.step,
        samples_consumed=config.timeline().first_sample(source.step),
        optimizer_steps=source.optimizer_steps,
        loss_scaler=source.loss_scaler if config.precision == "fp16" else None,
    )


def _unwrapped(name: str) -> str:
    return WRAPPERS.sub("", name)


def _architecture(
    source: DeepSpeedCheckpoint, config: ModelConfig, tensors: Mapping[str, Tensor], names: str | None
) -> Architecture | None:
    """Return the class of transformers whose names the checkpoint has; None if it has ours."""
    if names == "manta":
        return None
    try:
        architecture = architecture_for(config)
    except InputError:
        if names is None:
            return None
        raise
    hf = {name for mapping in map_tensors(architecture, config, tensors) for name in mapping.hf}
    fitting = len(hf & _as_in_files(source.parameters, architecture).keys())
    return architecture if names or fitting > len(tensors.keys() & source.parameters.keys()) else None


def _check_shapes(source: DeepSpeedCheckpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    found = {name: tuple(states[MASTER].shape) for name, states in source.parameters.items()}
    found |= {name: tuple(tensor.shape) for name, tensor in source.buffers.items() if name in expected}
    found |= {name: found[original] for name, original in source.tied.items() if name in expected and original in found}
    originals = {source.tied.get(name, name) for name in expected}
    found = {name: shape for name, shape in found.items() if name in expected or name not in originals}
    if found != expected:
        raise InputError(f"{source.folder}: {first_difference(expected, found)}. Set model to the one that was trained.")


def _check_tied(source: DeepSpeedCheckpoint, mappings: Sequence[TensorMapping]) -> None:
    """Raises InputError if two of our weights are one in the checkpoint: training would separate them."""
    users: dict[str, TensorMapping] = {}
    for mapping in mappings:
        for name in mapping.hf:
            original = source.tied.get(name, name)
            if users.setdefault(original, mapping) is not mapping:
                problem = f"expected a separate weight, got one tied to {original}. Set model.tied_head=true."
                raise InputError(f"{source.folder}: {name}: {problem}")


def _check_optimizer(source: DeepSpeedCheckpoint, optimizer: OptimizerConfig) -> None:
    """Raises InputError if a parameter has another optimizer's state. Before the first update there may be none yet."""
    expected = {MASTER, *OPTIMIZERS[optimizer.name]}
    has_none_yet = source.updates == 0 if optimizer.name == "sgd" else source.optimizer_steps == 0
    may_lack_all = has_none_yet or (optimizer.name == "sgd" and optimizer.beta1 == 0)
    for name, states in sorted(source.parameters.items()):
        surplus, missing = sorted(states.keys() - expected), sorted(expected - states.keys())
        problem = f"expected the state of {optimizer.name}, got {surplus[0]}" if surplus else None
        if not surplus and missing and not (may_lack_all and len(missing) == len(expected) - 1):
            problem = f"expected {missing[0]} of {optimizer.name}, got none"
        if problem:
            raise InputError(f"{source.folder}: {name}: {problem}. Set optimizer.name to the one that was used.")


def _read(source: DeepSpeedCheckpoint, key: str, name: str) -> Tensor:
    original = source.tied.get(name, name)
    if original not in source.parameters:
        return source.buffers[original]
    states = source.parameters[original]
    return states[key] if key in states else torch.zeros_like(states[MASTER])


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
