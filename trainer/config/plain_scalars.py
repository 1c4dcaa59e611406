"""How a config's plain YAML values are read: as its fields want them, where YAML 1.1 would guess another type.

A directory may be named 2024, and a source `no` or 1e3: where text is wanted, plain text is what was written. Where an integer is wanted,
4.0 and 1e4 are integers.
"""

from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

_TAG = "tag:yaml.org,2002:"
_TYPES = {"int": int, "float": float, "bool": bool}


def fit(node: yaml.Node, schema: object) -> None:
    """Change the tags of the plain scalars in `node` to those of `schema`: a section, or the type of a field."""
    kinds = list(_kinds(schema))
    if isinstance(node, yaml.ScalarNode):
        _fit_scalar(node, kinds)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            fit(item, next(_items(kinds), None))
    else:
        keys = {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            fit(value, schema if name == "<<" else _field(kinds, name, keys))


def field_type(schema: object, key: str) -> object:
    """Return the type of a dotted key; None if it is unknown."""
    for name in key.split("."):
        schema = _field(list(_kinds(schema)), name, {name})
    return schema


def _fit_scalar(node: yaml.ScalarNode, kinds: list[Any]) -> None:
    own = _TYPES.get(node.tag.removeprefix(_TAG))
    if node.style is not None or own is None or own in kinds or (own is int and float in kinds):
        return
    if int in kinds and own is float and _is_whole(node.value):
        node.tag, node.value = f"{_TAG}int", str(int(float(node.value)))
    elif any(kind in {str, Path} or _is_named_by_text(kind) for kind in (*kinds, *_items(kinds))):
        node.tag = f"{_TAG}str"


def _is_whole(text: str) -> bool:
    """Whether the number is an integer that a float represents exactly."""
    try:
        return float(text).is_integer() and Decimal(text) == Decimal(float(text))
    except (ArithmeticError, ValueError):
        return False


def _kinds(schema: object) -> Iterator[Any]:
    """Yield the types that an annotation allows."""
    origin, arguments = get_origin(schema), get_args(schema)
    if origin is Annotated:
        yield from _kinds(arguments[0])
    elif origin in {Union, UnionType}:
        for argument in arguments:
            yield from _kinds(argument)
    elif origin is Literal:
        yield from map(type, arguments)
    elif schema not in {None, NoneType}:
        yield schema


def _items(kinds: list[Any]) -> Iterator[Any]:
    """Yield the type of a list's items."""
    return (get_args(kind)[0] for kind in kinds if get_origin(kind) in {tuple, list})


def _field(kinds: list[Any], name: str | None, keys: set[str]) -> object:
    """Return the type of a mapping's value. keys: all keys of the mapping."""
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind.model_fields[name].annotation if name in kind.model_fields else None
        if get_origin(kind) in {dict, Mapping}:
            return get_args(kind)[1]
    item = next(_items(kinds), None)
    return item if _is_named_by_text(item) and "path" not in keys else _field([item], name, keys) if item is not None else None


def _is_named_by_text(kind: object) -> bool:
    """Whether a plain text stands for a section with this path, as it does for a source."""
    return isinstance(kind, type) and issubclass(kind, BaseModel) and "path" in kind.model_fields
