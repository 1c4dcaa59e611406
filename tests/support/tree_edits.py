"""Edits of trees of dicts and lists, such as a manifest or a pickle holds, for tests with hostile input."""

import copy
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

Edit = tuple[list[int], str, int]
EDIT = st.tuples(
    st.lists(st.integers(0, 2**16), max_size=6),  # which child to descend to, at each level
    st.sampled_from(["delete", "replace", "replace", "repeat", "exchange", "copy", "nudge", "nudge", "nudge"]),
    st.integers(0, 2**16),  # which sibling, which value, how far
)


def edit(tree: dict, edits: Sequence[Edit], values: Sequence[Any]) -> None:
    """Delete, replace, repeat, exchange, copy or nudge values of a tree. values: to replace others by."""
    for path, action, number in edits:
        parent, key = {"": tree}, ""
        for step in path or [number]:
            if isinstance(parent[key], dict | list) and parent[key]:
                parent = parent[key]
                key = _pick(parent, step)
        if parent is not tree or key != "":
            _apply(parent, key, action, number, values)


def _pick(parent: dict | list, number: int) -> Any:
    return sorted(parent, key=str)[number % len(parent)] if isinstance(parent, dict) else number % len(parent)


def _apply(parent: dict | list, key: Any, action: str, number: int, values: Sequence[Any]) -> None:
    value, other = parent[key], _pick(parent, number)
    if action == "delete":
        del parent[key]
    elif action == "repeat" and isinstance(parent, list):
        parent.insert(number % (len(parent) + 1), copy.deepcopy(value))
    elif action == "exchange":
        parent[key], parent[other] = parent[other], value
    elif action == "copy":
        parent[other] = copy.deepcopy(value)
    elif action == "nudge" and type(value) is int:
        parent[key] += [-64, -8, -4, -1, 1, 4, 8, 64, 128][number % 9]
    elif action == "nudge" and isinstance(value, str):
        parent[key] += ["0", "/", "\n", " "][number % 4]
    else:
        parent[key] = copy.deepcopy(values[number % len(values)])
