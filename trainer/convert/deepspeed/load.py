"""What plain DeepSpeed saved (`engine.save_checkpoint`), as whole tensors under the names that its model had.

ZeRO 1 and 2 lay the parameters of a group end to end, and cut that into a partition a rank. ZeRO-3 cuts each parameter into one part a
rank, the last filled up, and lays the parts of a sub-group end to end. Which parameters, in which order: `param_shapes`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from manta.data.errors import InputError
from manta.trainer.checkpoint.manifest import LOSS_SCALER
from manta.trainer.convert.deepspeed.files import folder, model_file, read, share_files

MASTER = "master"
States = dict[str, Tensor]  # of one parameter: MASTER, and what the optimizer keeps for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    at: Path
    stage: int
    ranks: int
    step: int  # as we count: also those that an overflow skipped
    learned: int  # those that were not skipped
    optimizer_steps: int  # that the optimizer has counted; SGD does not count
    samples: int
    loss_scaler: dict[str, float] | None  # fp16
    parameters: dict[str, States]
    buffers: States
    shared: dict[str, str]  # a further name of a parameter -> the one it stands under
    settings: dict[str, dict[str, Any]]  # of each parameter, what its optimizer's group is told; empty where the files do not say
    clipping: float


def load_deepspeed(directory: Path) -> Saved:
    """Raises InputError with the first thing that is missing, damaged, not DeepSpeed's, or cut over more than ZeRO."""
    at = folder(directory)
    file = model_file(at)
    model = read(file)
    try:
        if frozen := model["frozen_param_shapes"]:
            raise InputError(f"{file}: {next(iter(frozen))}: got a weight that was not trained, wants all trained, as manta does")
        return _without_zero(at, model) if model["optimizer"] else _of_shares(at, model)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        told = " ".join(str(error).split())
        raise InputError(f"{at}: {type(error).__name__}: {told}; wants files as engine.save_checkpoint writes them") from None


def _of_shares(at: Path, model: dict[str, Any]) -> Saved:
    ranks = int(model["dp_world_size"])
    shares = [read(file)["optimizer_state_dict"] for file in share_files(at, ranks)]
    first = shares[0]
    stage = int(first.get("zero_stage", 1))  # bf16's own optimizer does not say; it cuts as ZeRO-1 does
    shapes: list[dict[str, Size]] = model["param_shapes"]
    inner = [share["optimizer_state_dict" if stage == 3 else "base_optimizer_state"] for share in shares]
    masters = [share["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] for share in shares]
    states = [[_tensors(_state(one, group)) for group in range(len(shapes))] for one in inner]
    flats = [
        [{MASTER: flat} | held for flat, held in zip(groups, kept, strict=True)] for groups, kept in zip(masters, states, strict=True)
    ]  # by rank and group
    parameters: dict[str, States] = {}
    for group, sizes in enumerate(shapes):
        cut = [of_rank[group] for of_rank in flats]
        if stage == 3:
            parameters |= _parts(cut, sizes, at)
        else:
            paddings = first.get("param_alignment_paddings")
            parameters |= _stretches(cut, sizes, [0] * len(sizes) if paddings is None else paddings[group], at)
    if stage < 3 and not model["ds_config"].get("zero_optimization", {}).get("round_robin_gradients"):
        _check_places(at, shares, shapes)  # under round robin DeepSpeed tells places of another order
    counts = chain(*((_step(one, group) for group in range(len(shapes))) for one in inner))
    scaler = vars(first["loss_scaler"]) if first.get("dynamic_loss_scale") else None
    return Saved(
        stage=stage,
        ranks=ranks,
        optimizer_steps=_one_count(counts, at),
        loss_scaler=None if scaler is None else {name: scaler[name] for name in LOSS_SCALER},
        parameters=parameters,
        settings=_settings(inner[0], [list(sizes) for sizes in shapes]),
        shared=dict(model["shared_params"]),
        **_common(at, model),
    )


def _common(at: Path, model: dict[str, Any]) -> dict[str, Any]:
    """What is told alike under every stage."""
    buffers = set(model["buffer_names"])
    return {
        "at": at,
        "step": int(model["global_steps"]),
        "learned": int(model["global_steps"]) - int(model["skipped_steps"]),
        "samples": int(model["global_samples"]),
        "buffers": {name: tensor for name, tensor in model["module"].items() if name in buffers},
        "clipping": float(model["ds_config"].get("gradient_clipping", 0.0)),
    }


def _state(optimizer: Any, group: int) -> Mapping[str, Any]:
    """What an optimizer keeps of a group; an elastic checkpoint has a list."""
    return optimizer[group] if isinstance(optimizer, list) else optimizer["state"].get(group, {})


def _tensors(state: Mapping[str, Any]) -> States:
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and key != "step"}


def _step(optimizer: Any, group: int) -> int | None:
    """Some keep the count beside a group's settings."""
    told = _state(optimizer, group).get("step")
    if told is None and isinstance(optimizer, dict):
        told = next((held["step"] for held in optimizer["param_groups"] if "step" in held), None)
    return None if told is None else int(told)


def _one_count(counts: Iterable[int | None], at: Path) -> int:
    found = {count for count in counts if count is not None}
    if len(found) > 1:
        raise InputError(f"{at}: got optimizers that have counted {' and '.join(map(str, sorted(found)))} steps, wants files of one save")
    return next(iter(found), 0)


def _stretches(cut: Sequence[States], shapes: Mapping[str, Size], paddings: Sequence[int], at: Path) -> dict[str, States]:
    """ZeRO 1, 2. cut: of one group, by rank."""
    whole = {key: torch.cat([flat[key].view(-1) for flat in cut]) for key in cut[0]}
    found: dict[str, States] = {}
    start = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        count = math.prod(shape)
        if any(start + count > len(flat) for flat in whole.values()):
            raise InputError(f"{at}: {name}: got partitions that end before it, wants {list(shape)}; are all files of one save?")
        found[name] = {key: flat[start : start + count].view(shape) for key, flat in whole.items()}
        start += count + padding
    return found


def _check_places(at: Path, shares: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Size]]) -> None:
    """Raises InputError where a rank's file holds other stretches than its rank's: two may have been exchanged."""
    for group in range(len(shapes)):
        begun = dict.fromkeys(shapes[group], 0)  # how much of each weight the ranks so far hold
        for rank, share in enumerate(shares):
            for name, address in (share.get("param_slice_mappings") or [{}] * len(shapes))[group].items():
                if begun[name] and address.start != 0:
                    raise InputError(f"{at}: {name}: got the partition of another rank as that of rank {rank}; was a file renamed?")
                begun[name] += address.numel


def _parts(cut: Sequence[States], shapes: Mapping[str, Size], at: Path) -> dict[str, States]:
    """ZeRO-3. cut: of one sub-group, by rank."""
    found: dict[str, States] = {}
    start = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        size = -(-count // len(cut))
        found[name] = {key: torch.cat([flat[key][start : start + size] for flat in cut])[:count].view(shape) for key in cut[0]}
        start += size
    if any(len(flat) != start for flats in cut for flat in flats.values()):
        raise InputError(f"{at}: got partitions of other lengths than its weights come to; are all files of one save?")
    return found


def _settings(optimizer: Any, names: Sequence[Sequence[str]]) -> dict[str, dict[str, Any]]:
    """names: of the parameters that the optimizer knows under each of its numbers."""
    if isinstance(optimizer, list):
        return {}
    return {name: group for group in optimizer["param_groups"] for number in group["params"] for name in names[int(number)]}


def _without_zero(at: Path, model: dict[str, Any]) -> Saved:
    """The optimizer numbers its parameters, group after group, and does not name them."""
    optimizer = model["optimizer"]
    if optimizer.keys() != {"state", "param_groups"}:
        raise InputError(
            f"{at}: got 16 bits without ZeRO, whose optimizer DeepSpeed keeps otherwise; go on from a save under ZeRO 1, 2 or 3"
        )
    common = _common(at, model)
    weights, shared = _apart({name: tensor for name, tensor in model["module"].items() if name not in common["buffers"]})
    numbers = dict(_numbered(weights, optimizer, at))
    parameters = {name: {MASTER: weight} | _tensors(_state(optimizer, numbers[name])) for name, weight in weights.items()}
    names: list[list[str]] = [[name] for name in sorted(numbers, key=numbers.__getitem__)]
    return Saved(
        stage=0,
        ranks=int(model["dp_world_size"]),
        optimizer_steps=_one_count((_step(optimizer, number) for number in numbers.values()), at),
        loss_scaler=None,
        parameters=parameters,
        settings=_settings(optimizer, names),
        shared=shared,
        **common,
    )


def _apart(weights: Mapping[str, Tensor]) -> tuple[States, dict[str, str]]:
    """Each once, and the further names of those that have several."""
    first: dict[tuple[int, Size], str] = {}
    for name, weight in weights.items():
        first.setdefault((weight.data_ptr(), weight.shape), name)
    named = {name: first[weight.data_ptr(), weight.shape] for name, weight in weights.items()}
    return {name: weights[name] for name in first.values()}, {name: other for name, other in named.items() if name != other}


def _numbered(weights: States, optimizer: Mapping[str, Any], at: Path) -> Iterator[tuple[str, int]]:
    """Which number each weight has: in its group weights stand as in the model; which group, their shapes must tell.

    Raises InputError where they fit in no way, or in more than one.
    """
    groups: list[list[int]] = [group["params"] for group in optimizer["param_groups"]]
    if all("param_names" in group for group in optimizer["param_groups"]):
        told = chain.from_iterable(zip(group["param_names"], group["params"], strict=True) for group in optimizer["param_groups"])
        yield from ((name, number) for name, number in told if name in weights)
        return
    shapes = {number: next(iter(_tensors(state).values())).shape for number, state in optimizer["state"].items() if _tensors(state)}
    ways: list[dict[tuple[int, ...], list[int]]] = [{(0,) * len(groups): []}]  # after each weight: how far in each group -> last taken from
    for name, weight in weights.items():
        reached: dict[tuple[int, ...], list[int]] = {}
        for place in ways[-1]:
            for group, numbers in enumerate(groups):
                if place[group] < len(numbers) and shapes.get(numbers[place[group]], weight.shape) == weight.shape:
                    reached.setdefault((*place[:group], place[group] + 1, *place[group + 1 :]), []).append(group)
        if not reached:
            raise InputError(
                f"{at}: {name}: got {list(weight.shape)}, and the optimizer has no weight of that shape next; is it of this model?"
            )
        ways.append(reached)
    place = tuple(map(len, groups))
    if place not in ways[-1]:
        raise InputError(f"{at}: got an optimizer of {sum(place)} weights and a model of {len(weights)}, wants the same")
    for name, reached in zip(reversed(list(weights)), reversed(ways[1:]), strict=True):
        if len(reached[place]) > 1 and shapes:
            remedy = "save under ZeRO 1, 2 or 3, whose files name them, or give the optimizer named_parameters()"
            raise InputError(f"{at}: {name}: got several groups of the optimizer that it may be in, wants one; {remedy}")
        group = reached[place][0]
        place = (*place[:group], place[group] - 1, *place[group + 1 :])
        yield name, groups[group][place[group]]
