"""What DeepSpeed saved, under our names: of one of our models or the user's own as it is, of one of transformers by the rows that its
files are imported by. Optimizer state goes the same way as the weights: rows move elements, and change none.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from manta.data.errors import InputError
from manta.trainer.architectures.families import MIXTRAL, Architecture, architecture_for
from manta.trainer.architectures.tensor_map import SAME, Link, bind, tensors
from manta.trainer.checkpoint.manifest import Progress
from manta.trainer.checkpoint.shards import Pieces
from manta.trainer.config.model import ModelConfig
from manta.trainer.config.training import OptimizerConfig, TrainingConfig
from manta.trainer.convert.deepspeed.load import MASTER, Saved, States
from manta.trainer.model.build import build
from manta.trainer.model.transformer import Transformer
from manta.trainer.optim.optimizers import STATES

Names = Literal["manta", "huggingface"]
WRAPPED = re.compile(r"^(module\.|_orig_mod\.)+")  # by another's wrapper, and by torch.compile
FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
MIXTRAL_TODAY = (
    (r"\.mlp\.(gate|experts)\.", r".block_sparse_moe.\1."),
    (r"(experts\.\d+)\.gate_proj", r"\1.w1"),
    (r"(experts\.\d+)\.down_proj", r"\1.w2"),
    (r"(experts\.\d+)\.up_proj", r"\1.w3"),
)
"""Names of a model in memory, and of its files."""
OPTIMIZERS = {"adamw": STATES[torch.optim.AdamW], "sgd": STATES[torch.optim.SGD]}


def logical_state(saved: Saved, config: TrainingConfig, *, vocabulary: int, code: Path, names: Names | None) -> dict[str, Pieces]:
    """As a checkpoint of ours has it. vocabulary: the tokenizer's size. names: None for those of which the files have more.

    Raises InputError with the first tensor that is missing, surplus or of another shape.
    """
    with torch.device("meta"):
        model = build(config.model, vocabulary=vocabulary, sequence_length=config.data.sequence_length, code=code)
    return _Renamed(saved, config, model, config.model.vocabulary or vocabulary, names).state()


def progress(saved: Saved, config: TrainingConfig) -> Progress:
    """How far the run of this config has come with it."""
    return Progress(
        step=saved.step,
        samples_consumed=config.timeline().first_sample(saved.step),
        optimizer_steps=saved.optimizer_steps,
        loss_scaler=saved.loss_scaler if config.precision == "fp16" else None,
    )


class _Renamed:
    def __init__(self, saved: Saved, config: TrainingConfig, model: Transformer, vocabulary: int, names: Names | None) -> None:
        self._saved, self._config = saved, config
        self._model = {name: tuple(tensor.shape) for name, tensor in tensors(model).items()}
        self._trained = {name for name, _ in model.named_parameters()}
        self._parameters = {_bare(name): states for name, states in saved.parameters.items()}
        self._buffers = {_bare(name): tensor for name, tensor in saved.buffers.items()}
        self._shared = {_bare(name): _bare(first) for name, first in saved.shared.items()}
        self._links, self._vocabulary = self._linked(names, vocabulary)

    def state(self) -> dict[str, Pieces]:
        """Beside what it gives no more than one tensor is held."""
        self._check()
        keys = (MASTER, *OPTIMIZERS[self._config.optimizer.name])
        state: dict[str, Pieces] = {}
        for link in self._links:
            for key in keys if self._trained.issuperset(link.ours) else (MASTER,):
                for name, tensor in link.take(lambda name, key=key: self._read(name, key)).items():
                    state[f"{key}/{name}"] = Pieces.all_of(_whole(tensor, self._model[name]))
        return state

    def _linked(self, names: Names | None, vocabulary: int) -> tuple[list[Link], int]:
        """Which of ours are which of theirs; and how many rows of theirs are no padding."""
        same, config = [Link((name,), (name,), SAME) for name in self._model], self._config.model
        rows = max((shape[0] for shape in self._model.values()), default=0)  # of our names padding is theirs, too
        if names == "manta" or (names is None and ":" in config.family):
            return same, rows
        try:
            theirs = _of_transformers(config, self._model)
        except InputError:
            if names is None:
                return same, rows
            raise
        named = _as_in_files(self._parameters, architecture_for(config))
        if names == "huggingface" or _known(named, theirs) > _known(self._parameters, same):
            self._parameters = named
            return theirs, vocabulary
        return same, rows

    def _check(self) -> None:
        wanted: dict[str, tuple[int, ...]] = {}
        for link in self._links:
            ours = {name: torch.empty(self._model[name], device="meta") for name in link.ours}
            wanted |= {name: tuple(tensor.shape) for name, tensor in link.export(ours, self._vocabulary).items()}
        found = {name: tuple(states[MASTER].shape) for name, states in self._parameters.items()}
        there = found | {name: tuple(tensor.shape) for name, tensor in self._buffers.items() if name in wanted}
        there |= {name: there[first] for name, first in self._shared.items() if name in wanted and first in there}
        used = {self._shared.get(name, name) for name in wanted}
        wrong = [
            f"{name}: got {list(there[name]) if name in there else 'nothing'}, wants {list(wanted[name]) if name in wanted else 'nothing'}"
            for name in (*wanted, *sorted(there.keys() - used))
            if there.get(name) != wanted.get(name)
        ]
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise InputError(f"{self._saved.at}: {wrong[0]}{more}; was it another model? Set model to what it was")
        self._check_tied()
        for told in self._wrong_states():
            raise InputError(f"{self._saved.at}: {told}")

    def _check_tied(self) -> None:
        """Raises InputError where two of our weights would be one of theirs: they would learn apart from now on."""
        takers: dict[str, Link] = {}
        for link in self._links:
            for name in link.theirs:
                first = self._shared.get(name, name)
                if takers.setdefault(first, link) is not link:
                    raise InputError(f"{self._saved.at}: {name}: got it tied to {first}, wants it apart; set model.tied_head=true")

    def _wrong_states(self) -> Iterator[str]:
        """What the optimizer keeps has to be what ours keeps; before the first step that learns it may have nothing yet."""
        told = self._config.optimizer.name
        wanted = {MASTER, *OPTIMIZERS[told]}
        for name, states in sorted(self._parameters.items()):
            if surplus := sorted(states.keys() - wanted):
                yield f"{name}: got the optimizer's {surplus[0]}, which {told} does not keep; is optimizer.name another?"
            if (missing := sorted(wanted - states.keys())) and not self._may_lack(missing):
                yield f"{name}: got no {missing[0]} of the optimizer, wants it for {told}; is optimizer.name another?"

    def _may_lack(self, missing: list[str]) -> bool:
        told: OptimizerConfig = self._config.optimizer
        if told.name == "sgd":
            return told.beta1 == 0 or self._saved.learned == 0
        return self._saved.optimizer_steps == 0 and len(missing) == len(OPTIMIZERS[told.name])

    def _read(self, name: str, key: str) -> Tensor:
        first = self._shared.get(name, name)
        if first not in self._parameters:
            return self._buffers[first]
        states = self._parameters[first]
        return states[key] if key in states else torch.zeros_like(states[MASTER])


def _bare(name: str) -> str:
    return WRAPPED.sub("", name)


def _known(named: Mapping[str, States], links: list[Link]) -> int:
    return len(named.keys() & {name for link in links for name in link.theirs})


def _as_in_files(named: Mapping[str, States], architecture: Architecture) -> dict[str, States]:
    """Since version 5 transformers holds all experts of a block in two weights, which its files, and our rows, name one by one."""
    apart: dict[str, States] = {}
    for name, states in named.items():
        if (fused := FUSED.fullmatch(name)) is None:
            apart[name] = states
            continue
        parts = fused[2].replace("gate_up_proj", "gate_proj up_proj").split()
        for key, whole in states.items():
            for part, weights in zip(parts, whole.chunk(len(parts), dim=1), strict=True):
                for expert, weight in enumerate(weights):
                    apart.setdefault(f"{fused[1]}.{expert}.{part}.weight", {})[key] = weight
    return {_older(name) if architecture is MIXTRAL else name: states for name, states in apart.items()}


def _older(name: str) -> str:
    for pattern, older in MIXTRAL_TODAY:
        name = re.sub(pattern, older, name)
    return name


def _of_transformers(config: ModelConfig, model: dict[str, tuple[int, ...]]) -> list[Link]:
    """Raises InputError where it has no such architecture."""
    experts = config.experts.experts if config.experts else 0
    return bind(architecture_for(config).rows, model, layers=config.layers, experts=experts)


def _whole(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """In fp32, the vocabulary's padding beside it filled with zeros."""
    if tensor.shape == shape and tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    whole = torch.zeros(shape, dtype=torch.float32)
    whole[: len(tensor)].copy_(tensor)
    return whole


def differences(saved: Saved, config: TrainingConfig) -> list[str]:
    """What DeepSpeed was told otherwise than this config says, and losses depend on; the learning rate apart, which has a schedule."""
    told, pairs = config.optimizer, dict[str, tuple[object, object]]()
    for name, group in saved.settings.items():
        beta1, beta2 = group.get("betas", (group.get("momentum", told.beta1), told.beta2))
        pairs["optimizer.beta1"], pairs["optimizer.beta2"] = (beta1, told.beta1), (beta2, told.beta2)
        pairs["optimizer.epsilon"] = (group.get("eps", told.epsilon), told.epsilon)
        decay = told.weight_decay if saved.parameters[name][MASTER].ndim > 1 else 0.0
        if (was := group.get("weight_decay", 0.0)) != decay and not any(" of " in key for key in pairs):
            pairs[f"optimizer.weight_decay of {name}"] = (was, decay)  # one is enough to see by
    pairs["optimizer.gradient_clipping"] = (saved.clipping, told.gradient_clipping)
    pairs["samples read"] = (saved.samples, config.timeline().first_sample(saved.step))
    return [f"{key}: DeepSpeed had {was}, this config has {now}" for key, (was, now) in pairs.items() if was != now]
