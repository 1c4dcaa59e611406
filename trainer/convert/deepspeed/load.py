"""Load what plain DeepSpeed saved (`engine.save_checkpoint`), as whole tensors under the names of its model.

ZeRO 1 and 2 concatenate the parameters of a group and split that into one partition per rank. ZeRO-3 splits each parameter into
one part per rank, pads the last, and concatenates the parts of a sub-group. `param_shapes` has the parameters in order.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from manta.data.errors import InputError
from manta.trainer.checkpoint.manifest import LOSS_SCALER_FIELDS
from manta.trainer.convert.deepspeed.files import model_file, newest_folder, read_file, shard_files
from manta.trainer.convert.deepspeed.groups import ONE_SAVE, parameter_numbers, state_of, state_tensors

MASTER = "master"
States = dict[str, Tensor]  # of one parameter: MASTER, and the optimizer's


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedCheckpoint:
    folder: Path
    stage: int
    ranks: int
    step: int  # includes steps skipped because of an overflow, as ours does
    updates: int  # without them
    optimizer_steps: int  # counted by the optimizer; SGD does not count
    samples: int
    loss_scaler: dict[str, float] | None  # fp16
    parameters: dict[str, States]
    buffers: States
    tied: dict[str, str]  # other names of a parameter -> its name in `parameters`
    settings: dict[str, dict[str, Any]]  # of the optimizer's group of each parameter; empty if the files lack them
    clipping: float


def load_deepspeed(directory: Path) -> DeepSpeedCheckpoint:
    """Raises InputError with the first thing that is missing, damaged, not DeepSpeed's, or split by more than ZeRO."""
    folder = newest_folder(directory)
    file = model_file(folder)
    model = read_file(file)
    try:
        _refuse_frozen(file, model["frozen_param_shapes"])
        return _without_zero(folder, model) if model["optimizer"] else _with_zero(folder, model)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{folder}: expected files that engine.save_checkpoint wrote, got {problem}. Copy them again.") from None


def _refuse_frozen(file: Path, shapes: Mapping[str, Size]) -> None:
    if shapes:
        raise InputError(f"{file}: {next(iter(shapes))}: expected a trained weight, got a frozen one. Convert a run that trained all.")


def _with_zero(folder: Path, model: dict[str, Any]) -> DeepSpeedCheckpoint:
    ranks = int(model["dp_world_size"])
    shards = [read_file(file)["optimizer_state_dict"] for file in shard_files(folder, ranks)]
    first = shards[0]
    stage = int(first.get("zero_stage", 1))  # DeepSpeed's bf16 optimizer does not record it, and splits as ZeRO-1 does
    shapes: list[dict[str, Size]] = model["param_shapes"]
    optimizers = [shard["optimizer_state_dict" if stage == 3 else "base_optimizer_state"] for shard in shards]
    masters = [shard["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] for shard in shards]
    parameters: dict[str, States] = {}
    for group, (sizes, *flats) in enumerate(zip(shapes, *masters, strict=True)):
        partitions = [{MASTER: flat} | state_tensors(state_of(each, group)) for flat, each in zip(flats, optimizers, strict=True)]
        if stage == 3:
            parameters |= _join_zero3(partitions, sizes, folder)
        else:
            paddings = first.get("param_alignment_paddings")
            parameters |= _join_zero12(partitions, sizes, [0] * len(sizes) if paddings is None else paddings[group], folder)
    if stage < 3 and not model["ds_config"].get("zero_optimization", {}).get("round_robin_gradients"):
        _check_ranks(folder, shards, shapes)  # with round robin DeepSpeed records addresses in another order
    counts = (_step(optimizer, group) for optimizer in optimizers for group in range(len(shapes)))
    scaler = vars(first["loss_scaler"]) if first.get("dynamic_loss_scale") else None
    return DeepSpeedCheckpoint(
        stage=stage,
        optimizer_steps=_same_count(counts, folder),
        loss_scaler=None if scaler is None else {name: scaler[name] for name in LOSS_SCALER_FIELDS},
        parameters=parameters,
        settings=_settings(optimizers[0], [list(sizes) for sizes in shapes]),
        tied=dict(model["shared_params"]),
        **_common(folder, model),
    )


def _without_zero(folder: Path, model: dict[str, Any]) -> DeepSpeedCheckpoint:
    optimizer = model["optimizer"]
    if optimizer.keys() != {"state", "param_groups"}:
        raise InputError(f"{folder}: expected fp32 or ZeRO, got 16 bits without ZeRO. Save under ZeRO 1, 2 or 3, and convert that.")
    common = _common(folder, model)
    weights, tied = _separate_tied({name: tensor for name, tensor in model["module"].items() if name not in common["buffers"]})
    numbers = parameter_numbers({name: weight.shape for name, weight in weights.items()}, optimizer, folder)
    return DeepSpeedCheckpoint(
        stage=0,
        optimizer_steps=_same_count((_step(optimizer, number) for number in numbers.values()), folder),
        loss_scaler=None,
        parameters={name: {MASTER: weight} | state_tensors(state_of(optimizer, numbers[name])) for name, weight in weights.items()},
        settings=_settings(optimizer, [[name] for name in sorted(numbers, key=numbers.__getitem__)]),
        tied=tied,
        **common,
    )


def _common(folder: Path, model: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that do not depend on the ZeRO stage."""
    buffers = set(model["buffer_names"])
    return {
        "folder": folder,
        "ranks": int(model["dp_world_size"]),
        "step": int(model["global_steps"]),
        "updates": int(model["global_steps"]) - int(model["skipped_steps"]),
        "samples": int(model["global_samples"]),
        "buffers": {name: tensor for name, tensor in model["module"].items() if name in buffers},
        "clipping": float(model["ds_config"].get("gradient_clipping", 0.0)),
    }


def _step(optimizer: Any, number: int) -> int | None:
    """Return the optimizer's count, which some optimizers keep with the settings of a group."""
    step = state_of(optimizer, number).get("step")
    if step is None and isinstance(optimizer, dict):
        step = next((group["step"] for group in optimizer["param_groups"] if "step" in group), None)
    return None if step is None else int(step)


def _same_count(counts: Iterable[int | None], folder: Path) -> int:
    distinct = {count for count in counts if count is not None}
    if len(distinct) > 1:
        raise InputError(f"{folder}: expected one step count, got {' and '.join(map(str, sorted(distinct)))}. {ONE_SAVE}")
    return next(iter(distinct), 0)


def _join_zero12(partitions: Sequence[States], shapes: Mapping[str, Size], paddings: Sequence[int], folder: Path) -> dict[str, States]:
    """Return the parameters of a group. partitions: by rank."""
    whole = {key: torch.cat([flat[key].view(-1) for flat in partitions]) for key in partitions[0]}
    parameters: dict[str, States] = {}
    start = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        count = math.prod(shape)
        if any(start + count > len(flat) for flat in whole.values()):
            raise InputError(f"{folder}: {name}: expected {list(shape)}, got partitions that end before it. {ONE_SAVE}")
        parameters[name] = {key: flat[start : start + count].view(shape) for key, flat in whole.items()}
        start += count + padding
    return parameters


def _check_ranks(folder: Path, shards: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Size]]) -> None:
    """Raises InputError if a rank's file holds other fragments than that rank's: two may have been exchanged."""
    for group in range(len(shapes)):
        counts = dict.fromkeys(shapes[group], 0)  # elements of each weight in the ranks so far
        for rank, shard in enumerate(shards):
            for name, address in (shard.get("param_slice_mappings") or [{}] * len(shapes))[group].items():
                if counts[name] and address.start != 0:
                    raise InputError(f"{folder}: {name}: expected the partition of rank {rank}, got another rank's. Check the file names.")
                counts[name] += address.numel


def _join_zero3(partitions: Sequence[States], shapes: Mapping[str, Size], folder: Path) -> dict[str, States]:
    """Return the parameters of a sub-group. partitions: by rank."""
    parameters: dict[str, States] = {}
    start = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        size = -(-count // len(partitions))
        parts = {key: [flat[key][start : start + size] for flat in partitions] for key in partitions[0]}
        parameters[name] = {key: torch.cat(tensors)[:count].view(shape) for key, tensors in parts.items()}
        start += size
    if any(len(flat) != start for states in partitions for flat in states.values()):
        raise InputError(f"{folder}: expected partitions of {start} elements, got other lengths. {ONE_SAVE}")
    return parameters


def _settings(optimizer: Any, names: Sequence[Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Return the settings of each parameter's group. names: of the parameters that the optimizer has under each of its numbers."""
    if isinstance(optimizer, list):
        return {}
    return {name: group for group in optimizer["param_groups"] for number in group["params"] for name in names[int(number)]}


def _separate_tied(weights: Mapping[str, Tensor]) -> tuple[States, dict[str, str]]:
    """Return each weight once, and the other names of tied ones."""
    first: dict[tuple[int, Size], str] = {}
    for name, weight in weights.items():
        first.setdefault((weight.data_ptr(), weight.shape), name)
    originals = {name: first[weight.data_ptr(), weight.shape] for name, weight in weights.items()}
    return {name: weights[name] for name in first.values()}, {name: original for name, original in originals.items() if name != original}
