"""State of a torch optimizer, which numbers its parameters and does not name them."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Size, Tensor

from manta.data.errors import InputError

ONE_SAVE = "Copy the files of one save."
Taken = tuple[int, ...]  # by group: how many of its parameters are matched with weights


def state_of(optimizer: Any, number: int) -> Mapping[str, Any]:
    """Return the state of a parameter, or of a partition. An elastic checkpoint has a list."""
    return optimizer[number] if isinstance(optimizer, list) else optimizer["state"].get(number, {})


def state_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and key != "step"}


def parameter_numbers(weights: Mapping[str, Size], optimizer: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """Return the optimizer's number of each weight.

    A group has its weights in the order of the model; shapes decide the group. Raises InputError if none or several fit.
    """
    groups = optimizer["param_groups"]
    if all("param_names" in group for group in groups):
        named = chain.from_iterable(zip(group["param_names"], group["params"], strict=True) for group in groups)
        return {name: number for name, number in named if name in weights}
    numbers: list[list[int]] = [group["params"] for group in groups]
    tensors = {number: state_tensors(state) for number, state in optimizer["state"].items()}
    shapes = {number: next(iter(states.values())).shape for number, states in tensors.items() if states}
    return dict(_only_match(weights, numbers, _matches(weights, numbers, shapes, folder), folder, must_be_unique=bool(shapes)))


def _matches(
    weights: Mapping[str, Size], numbers: Sequence[Sequence[int]], shapes: Mapping[int, Size], folder: Path
) -> list[dict[Taken, list[int]]]:
    """Return for each weight, in order: what may be taken after it, and the groups that it may have been taken from."""
    steps: list[dict[Taken, list[int]]] = []
    reachable = [(0,) * len(numbers)]
    for name, shape in weights.items():
        step: dict[Taken, list[int]] = {}
        for taken in reachable:
            for group, of_group in enumerate(numbers):
                if taken[group] < len(of_group) and shapes.get(of_group[taken[group]], shape) == shape:
                    step.setdefault(_moved(taken, group, 1), []).append(group)
        if not step:
            raise InputError(f"{folder}: {name}: expected {list(shape)} next in a group of the optimizer, got other shapes. {ONE_SAVE}")
        steps.append(step)
        reachable = list(step)
    return steps


def _only_match(
    weights: Mapping[str, Size],
    numbers: Sequence[Sequence[int]],
    steps: Sequence[Mapping[Taken, list[int]]],
    folder: Path,
    *,
    must_be_unique: bool,
) -> Iterator[tuple[str, int]]:
    """Follow the steps back from the last weight, when all parameters are taken. must_be_unique: raise if groups can be chosen."""
    taken = tuple(map(len, numbers))
    if not steps or taken not in steps[-1]:
        raise InputError(f"{folder}: expected an optimizer of {len(weights)} weights, got one of {sum(taken)}. {ONE_SAVE}")
    for name, step in zip(reversed(list(weights)), reversed(steps), strict=True):
        group = step[taken][0]
        if len(step[taken]) > 1 and must_be_unique:
            remedy = "Save under ZeRO 1, 2 or 3, or construct the optimizer from named_parameters()."
            raise InputError(f"{folder}: {name}: expected one group of the optimizer that fits, got several. {remedy}")
        taken = _moved(taken, group, -1)
        yield name, numbers[group][taken[group]]


def _moved(taken: Taken, group: int, by: int) -> Taken:
    return (*taken[:group], taken[group] + by, *taken[group + 1 :])
