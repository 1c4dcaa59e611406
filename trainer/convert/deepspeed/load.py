"""Load what plain DeepSpeed saved (`engine.save_checkpoint`), as whole tensors under the names of its model.

ZeRO 1 and 2 concatenate the parameters of a group and split that into one partition per rank. ZeRO-3 splits each parameter into
one part per rank, pads the last, and concatenates the parts of a sub-group. `param_shapes` has the parameters in order.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from manta.data.errors import InputError, one_line
from manta.trainer.checkpoint.manifest import LOSS_SCALER_FIELDS
from manta.trainer.convert.deepspeed.files import model_file, newest_folder, read_file, shard_files
from manta.trainer.optim.optimizers import STATE_KEYS

MASTER = "master"
ONE_SAVE = "Copy the files of one save."
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
    with other_content(folder):
        common = _common(file, model)
        specific = _without_zero(folder, model, common["buffers"]) if model["optimizer"] else _with_zero(folder, model)
        checkpoint = DeepSpeedCheckpoint(**common, **specific)
        _check_values(checkpoint)
        return checkpoint


@contextmanager
def other_content(folder: Path) -> Generator[None]:
    """Raises InputError for whatever goes wrong with what the files hold: they may hold anything."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  see above
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{folder}: expected files that engine.save_checkpoint wrote, got {problem}. Copy them again.") from None


def _check_values(checkpoint: DeepSpeedCheckpoint) -> None:
    """Raises ValueError for counts, names, tensors and scales that no run has."""
    counts = (checkpoint.updates, checkpoint.step, checkpoint.optimizer_steps, checkpoint.samples)
    if min(counts) < 0 or max(counts) >= 2**53 or checkpoint.updates > checkpoint.step:
        raise ValueError(f"counts of {', '.join(map(str, counts))} updates, steps, optimizer steps and samples")
    own = {MASTER, *chain.from_iterable(STATE_KEYS.values())}
    for name, states in checkpoint.parameters.items():
        for key in own & states.keys():
            if states[key].shape != states[MASTER].shape or not states[key].is_floating_point():
                raise ValueError(f"{name}: {key} of {list(states[key].shape)}, {states[key].dtype}")
    for name, value in (checkpoint.loss_scaler or {}).items():
        if type(value) not in {int, float} or not math.isfinite(value):
            raise ValueError(f"{name} of {value}")


def _with_zero(folder: Path, model: dict[str, Any]) -> dict[str, Any]:
    ranks = int(model["dp_world_size"])
    shards = [read_file(file)["optimizer_state_dict"] for file in shard_files(folder, ranks)]
    if not all(isinstance(shard, dict) for shard in shards):
        raise TypeError("optimizer_state_dict of another type")
    first = shards[0]
    stage = int(first.get("zero_stage", 1))  # DeepSpeed's bf16 optimizer does not record it, and splits as ZeRO-1 does
    shapes: list[dict[str, Size]] = model["param_shapes"]
    optimizers = [shard["optimizer_state_dict" if stage == 3 else "base_optimizer_state"] for shard in shards]
    masters = [shard["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] for shard in shards]
    parameters: dict[str, States] = {}
    for group, (sizes, *flats) in enumerate(zip(shapes, *masters, strict=True)):
        partitions = [{MASTER: flat} | _state_tensors(_state_of(each, group)) for flat, each in zip(flats, optimizers, strict=True)]
        paddings = None if stage == 3 else first.get("param_alignment_paddings")
        if stage < 3:
            partitions = [{key: torch.cat([flat[key].view(-1) for flat in partitions]) for key in partitions[0]}]
        parameters |= _join(partitions, sizes, [0] * len(sizes) if paddings is None else paddings[group], folder, exact=stage == 3)
    if stage < 3 and not model["ds_config"].get("zero_optimization", {}).get("round_robin_gradients"):
        _check_ranks(folder, shards, shapes)  # with round robin DeepSpeed records addresses in another order
    counts = (_step(optimizer, group) for optimizer in optimizers for group in range(len(shapes)))
    scaler = vars(first["loss_scaler"]) if first.get("dynamic_loss_scale") else None
    return {
        "stage": stage,
        "optimizer_steps": _same_count(counts, folder),
        "loss_scaler": None if scaler is None else {name: scaler[name] for name in LOSS_SCALER_FIELDS},
        "parameters": parameters,
        "settings": _settings(optimizers[0], [list(sizes) for sizes in shapes]),
        "tied": dict(model["shared_params"]),
    }


def _without_zero(folder: Path, model: dict[str, Any], buffers: States) -> dict[str, Any]:
    optimizer = model["optimizer"]
    if optimizer.keys() != {"state", "param_groups"}:
        raise InputError(f"{folder}: expected fp32 or ZeRO, got 16 bits without ZeRO. Save under ZeRO 1, 2 or 3, and convert that.")
    weights, tied = _separate_tied({name: tensor for name, tensor in model["module"].items() if name not in buffers})
    numbers = _parameter_numbers(weights, optimizer, folder)
    return {
        "stage": 0,
        "optimizer_steps": _same_count((_step(optimizer, number) for number in numbers.values()), folder),
        "loss_scaler": None,
        "parameters": {name: {MASTER: weight} | _state_tensors(_state_of(optimizer, numbers[name])) for name, weight in weights.items()},
        "settings": _settings(optimizer, [[name] for name in sorted(numbers, key=numbers.__getitem__)]),
        "tied": tied,
    }


def _common(file: Path, model: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that do not depend on the ZeRO stage. Raises InputError if weights are frozen."""
    if frozen := model["frozen_param_shapes"]:
        raise InputError(f"{file}: {next(iter(frozen))}: expected a trained weight, got a frozen one. Convert a run that trained all.")
    buffers = set(model["buffer_names"])
    return {
        "folder": file.parent,
        "ranks": int(model["dp_world_size"]),
        "step": int(model["global_steps"]),
        "updates": int(model["global_steps"]) - int(model["skipped_steps"]),
        "samples": int(model["global_samples"]),
        "buffers": {name: tensor for name, tensor in model["module"].items() if name in buffers},
        "clipping": float(model["ds_config"].get("gradient_clipping", 0.0)),
    }


def _state_of(optimizer: Any, number: int) -> Mapping[str, Any]:
    """Return the state of a parameter, or of a partition. An elastic checkpoint has a list."""
    return optimizer[number] if isinstance(optimizer, list) else optimizer["state"].get(number, {})


def _state_tensors(state: Mapping[str, Any]) -> States:
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and key != "step"}


def _step(optimizer: Any, number: int) -> int | None:
    """Return the optimizer's count, which some optimizers keep with the settings of a group."""
    step = _state_of(optimizer, number).get("step")
    if step is None and isinstance(optimizer, dict):
        step = next((group["step"] for group in optimizer["param_groups"] if "step" in group), None)
    return None if step is None else int(step)


def _same_count(counts: Iterable[int | None], folder: Path) -> int:
    distinct = {count for count in counts if count is not None}
    if len(distinct) > 1:
        raise InputError(f"{folder}: expected one step count, got {' and '.join(map(str, sorted(distinct)))}. {ONE_SAVE}")
    return next(iter(distinct), 0)


def _join(
    partitions: Sequence[States], shapes: Mapping[str, Size], paddings: Sequence[int], folder: Path, *, exact: bool
) -> dict[str, States]:
    """Return the parameters of a group: each consists of one part of every partition. exact: nothing may follow the last."""
    parameters: dict[str, States] = {}
    start = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        count = math.prod(shape)
        size = -(-count // len(partitions))
        if any(start + size > len(flat) for states in partitions for flat in states.values()):
            raise InputError(f"{folder}: {name}: expected {list(shape)}, got partitions that end before it. {ONE_SAVE}")
        parts = {key: [states[key][start : start + size] for states in partitions] for key in partitions[0]}
        parameters[name] = {key: (torch.cat(flats) if len(flats) > 1 else flats[0])[:count].view(shape) for key, flats in parts.items()}
        start += size + padding
    if exact and any(len(flat) != start for states in partitions for flat in states.values()):
        raise InputError(f"{folder}: expected partitions of {start} elements, got other lengths. {ONE_SAVE}")
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


def _parameter_numbers(weights: States, optimizer: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """Return the number of each weight in a torch optimizer, which does not name its parameters.

    A group has its weights in the order of the model; shapes decide the group. Raises InputError if none or several fit.
    """
    groups = [group["params"] for group in optimizer["param_groups"]]
    if all("param_names" in group for group in optimizer["param_groups"]):
        names = chain.from_iterable(group["param_names"] for group in optimizer["param_groups"])
        return {name: number for name, number in zip(names, chain.from_iterable(groups), strict=True) if name in weights}
    states = {number: list(_state_tensors(state).values()) for number, state in optimizer["state"].items()}
    shapes = {number: tensors[0].shape for number, tensors in states.items() if tensors}
    # How many parameters of each group are matched -> up to two ways to do so, each a linked list of numbers, the last first.
    ways: dict[tuple[int, ...], list[Any]] = {(0,) * len(groups): [()]}
    for name, weight in weights.items():
        longer: dict[tuple[int, ...], list[Any]] = {}
        for taken, found in ways.items():
            for group, numbers in enumerate(groups):
                if taken[group] < len(numbers) and shapes.get(number := numbers[taken[group]], weight.shape) == weight.shape:
                    after = (*taken[:group], taken[group] + 1, *taken[group + 1 :])
                    longer[after] = [*longer.get(after, []), *((number, way) for way in found)][:2]
        if not longer:
            expected = f"{list(weight.shape)} next in a group of the optimizer"
            raise InputError(f"{folder}: {name}: expected {expected}, got other shapes. {ONE_SAVE}")
        ways = longer
    matches = [list(_unlink(way))[::-1] for way in ways.get(tuple(map(len, groups)), [])]
    if not matches:
        raise InputError(f"{folder}: expected an optimizer of {len(weights)} weights, got one of {sum(map(len, groups))}. {ONE_SAVE}")
    if len(matches) > 1 and shapes:
        name = next(name for name, *numbers in zip(weights, *matches, strict=True) if numbers[0] != numbers[1])
        remedy = "Save under ZeRO 1, 2 or 3, or construct the optimizer from named_parameters()."
        raise InputError(f"{folder}: {name}: expected one group of the optimizer that fits, got several. {remedy}")
    return dict(zip(weights, matches[0], strict=True))


def _unlink(way: Any) -> Iterator[int]:
    while way:
        number, way = way
        yield number
